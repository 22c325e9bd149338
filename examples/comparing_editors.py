# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Two editors on the same facts, stopped and gone on with, as one table.

Run ``python examples/comparing_editors.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_edit import DataSpec, EditDataModule, MethodSpec, compare
from lightning_edit.demos import tiny_requests, trained_tiny_model


def main(folder: Path) -> None:
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tuned = MethodSpec("FineTune", settings={"layers": [1], "steps": 20, "lr": 0.02}, label="FT")

    def run(cells: str | None = None) -> None:
        frame = compare(
            methods=["SCR", tuned],
            data=[DataSpec(EditDataModule(requests=tiny_requests(6)), label="world")],
            model=str(folder / "model"),
            out=str(folder / "results"),
            cells=cells,
            progress=False,
        )
        free = frame[(frame["reading"] == "autoregressive") & (frame["kind"] == "")]
        print(free.pivot(index="method", columns="metric", values="value").round(2))

    run(cells="method=SCR")  # as if it had been stopped after one cell
    run()
    print(sorted(path.name for path in (folder / "results").glob("compare.*")))
    print((folder / "results" / "compare.md").read_text(encoding="utf-8").partition("\n\n##")[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
