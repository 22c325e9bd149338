# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A short film of the terminal for the README: an SVG of commands that were really run.

``python docs/film.py`` runs the commands below in an empty folder and writes ``docs/film.svg``.
Lines come as they came, pauses shortened; of a progress bar its last state stands. Who asks for no
motion sees the last picture. The drawing of the terminal is rich's.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["COMMANDS", "Line", "draw", "record"]

COMMANDS = (
    "lightning-edit fit -c edit --data.limit 3",
    "lightning-edit list runs/edit",
    "lightning-edit apply runs/edit/delta --output edited",
    "lightning-edit revert runs/edit/delta --model edited --output restored",
)
FILE = Path(__file__).parent / "film.svg"
WIDTH = 100
BAR = re.compile(r"[\w ]+: +(\d+%)?\|")
LONGEST_PAUSE = 1.2  # seconds
TYPING = 0.8
STYLE = """
.line { animation: appear 1ms both; }
@keyframes appear { from { visibility: hidden; } to { visibility: visible; } }
@media (prefers-reduced-motion: reduce) { .line { animation: none; } }
"""


class Line(NamedTuple):
    """A line of the terminal.

    Args:
        seconds: How long it took to come, after the one before it.
        text: What it says.
    """

    seconds: float
    text: str


def record(commands: Iterable[str], folder: Path) -> list[Line]:
    """Runs commands one after another, and keeps what they print with its time.

    Args:
        commands: Lines that begin with ``lightning-edit``.
        folder: Where they are run.

    Raises:
        subprocess.CalledProcessError: If one of them fails.
    """
    lines: list[Line] = []
    settings = {
        "COLUMNS": str(WIDTH),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),  # of this checkout, whatever is installed
        "TERM": "dumb",
        "NO_COLOR": "1",
    }
    for command in commands:
        lines += [Line(TYPING, f"$ {command}")]
        words = [sys.executable, "-m", "lightning_edit", *shlex.split(command)[1:]]
        last = time.monotonic()
        with subprocess.Popen(  # noqa: S603 - our own command
            words,
            cwd=folder,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        ) as process:
            for text in process.stdout or ():
                now = time.monotonic()
                line = Line(now - last, text.rstrip().replace(f"{folder}/", ""))
                last = now
                if BAR.match(lines[-1].text) and (BAR.match(line.text) or not line.text):
                    shown = line.text or lines[-1].text
                    lines[-1] = Line(lines[-1].seconds + line.seconds, shown)
                else:
                    lines.append(line)
        if process.returncode:
            told = "\n".join(line.text for line in lines)
            raise subprocess.CalledProcessError(process.returncode, command, told)
        lines.append(Line(0.0, ""))
    return lines[:-1]


def draw(lines: Sequence[Line], title: str) -> str:
    """The lines as an SVG in which each appears when it came.

    Args:
        lines: Of the terminal.
        title: Of the window.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    at, times = 0.0, []
    for seconds, text in lines:
        at += min(seconds, LONGEST_PAUSE)
        style = "bold" if text.startswith("$ ") else ""
        console.print(Text(text, style=style), soft_wrap=False)
        rows = len(Text(text).wrap(console, WIDTH)) or 1
        times += [at] * rows
    svg = console.export_svg(title=title, unique_id="film")
    # Its fonts would be fetched from elsewhere; the reader's own will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("</style>", f"{STYLE}</style>", 1)

    def appears(match: re.Match[str]) -> str:
        seconds = times[min(int(match[2]), len(times) - 1)]
        return f'<text style="animation-delay:{seconds:.2f}s" class="line {match[1]}'

    # rich names the line that a text stands on by what it is clipped to.
    return re.sub(r'<text class="([^>]*clip-path="url\(#film-line-(\d+)\)")', appears, svg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the commands and writes the film."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=FILE)
    parser.add_argument("--command", action="append", help="Instead of those of the README.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        lines = record(options.command or COMMANDS, Path(folder))
    options.output.write_text(draw(lines, "lightning-edit"), encoding="utf-8")


if __name__ == "__main__":
    main()
