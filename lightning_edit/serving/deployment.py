# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Versions of a set of edits on a running server: which are live, with what share, and undo."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from lightning_edit.core.errors import ServerError
from lightning_edit.core.files import file_hash, replacing
from lightning_edit.serving.router import check_shares, choose
from lightning_edit.serving.server import JSON, LiveServer

__all__ = ["RECORD", "Deployment", "Version", "folder_hash"]

#: The record of a deployment, in its folder.
RECORD = "served.json"

# Names become paths, ids of models and names of modules.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Version:
    """One version of a set of edits.

    Args:
        number: From 1 upwards.
        name: Of the adapter on the server.
        sha256: Over the names and bytes of the files in its folder.
        created: ISO date.
        edits: Folders of the saved edits that are in it.
        base: The model that it is for.
        rank: Of the adapter; 0 for a whole model.
        relative_error: Share of the edits' norm that the adapter leaves out.
    """

    number: int
    name: str
    sha256: str
    created: str
    edits: tuple[str, ...] = ()
    base: str = ""
    rank: int = 0
    relative_error: float = 0.0


class Deployment:
    """The versions of a set of edits, in a folder, and what of them a server answers with.

    Each version is an adapter of its own, named NAME-v1, NAME-v2 and so on, so that two can be
    served side by side. Everything is in ``served.json``, which is written whole or not at all,
    after the server has done its part.

    Args:
        folder: Made if it is missing.
        name: Of the set of edits: letters, digits, ``-`` and ``_``.
        seen_as: The folder as the server sees it, where that is another path.

    Raises:
        ServerError: If the name is none, or the record is damaged or of another name.

    Examples:
        >>> deployment = Deployment(getfixture("tmp_path"), "facts")
        >>> def write(folder, name):
        ...     folder.mkdir()
        ...     _ = (folder / f"{name}.gguf").write_bytes(b"...")
        >>> deployment.add(write).name
        'facts-v1'
        >>> deployment.live
        {}
    """

    def __init__(self, folder: str | Path, name: str = "edits", *, seen_as: str = "") -> None:
        if not _NAME.fullmatch(name):
            raise ServerError(
                f"`name` is expected to be letters, digits, - and _, but got {name!r}."
            )
        self.folder = Path(folder)
        self.name = name
        self.seen_as = seen_as
        self.versions: list[Version] = []
        #: Name of each live version to its share of the traffic.
        self.live: dict[str, float] = {}
        #: What was done, the last one last.
        self.history: list[dict[str, JSON]] = []
        self._read()

    # -- versions --------------------------------------------------------------------------

    def add(
        self,
        write: Callable[[Path, str], None],
        *,
        edits: tuple[str, ...] = (),
        base: str = "",
        rank: int = 0,
        relative_error: float = 0.0,
    ) -> Version:
        """Writes a version, which no server knows yet.

        Args:
            write: Given a folder that is not there and the version's name, fills it.
            edits: Folders of the saved edits that are in it.
            base: The model that it is for.
            rank: Of the adapter.
            relative_error: Share of the edits' norm that the adapter leaves out.
        """
        number = 1 + max((one.number for one in self.versions), default=0)
        while (self.folder / f"v{number}").exists():  # of a run that was stopped
            number += 1
        name, place = f"{self.name}-v{number}", self.folder / f"v{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write(place, name)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        version = Version(number, name, folder_hash(place), now, edits, base, rank, relative_error)
        self.versions.append(version)
        self._write()
        return version

    def version(self, number: int | None = None) -> Version:
        """One version by its number; the newest when None.

        Raises:
            ServerError: If there is none.
        """
        for one in reversed(self.versions):
            if number in (None, one.number):
                return one
        known = ", ".join(str(one.number) for one in self.versions) or "none"
        what = "no version yet" if number is None else f"no version {number}"
        raise ServerError(f"`{self.folder}` has {what} of `{self.name}`; there is {known}.")

    def path_of(self, version: Version) -> Path:
        """Where a version lies."""
        return self.folder / f"v{version.number}"

    def seen_path_of(self, version: Version) -> Path | PurePosixPath:
        """Where a version lies as the server sees it."""
        place = f"v{version.number}"
        return (
            PurePosixPath(self.seen_as) / place
            if self.seen_as
            else (self.folder / place).absolute()
        )

    # -- on a server -----------------------------------------------------------------------

    def push(self, server: LiveServer, number: int | None = None, share: float = 1.0) -> Version:
        """Has a version answer a share of the traffic, beside what is live.

        The others keep what is left of theirs, in proportion. The versions that were live before
        stay loaded until the next push, for requests that still ask for them and for ``undo``.

        Args:
            server: The server.
            number: Of the version; the newest when None.
            share: Of the traffic. All others are taken off it when 1.

        Raises:
            ServerError: If the version is not as it was written, or the server refuses it. What is
                live is as before then.
        """
        version = self.version(number)
        if not 0.0 < share <= 1.0:
            raise ServerError(f"`share` is expected to lie above 0 and up to 1, but got {share}.")
        others = {name: part for name, part in self.live.items() if name != version.name}
        left = 1.0 - share
        total = sum(others.values())
        scale = min(1.0, left / total) if total else 0.0
        live = {name: part * scale for name, part in others.items() if part * scale > 0}
        self._go(server, {**live, version.name: share}, "push", keep=set(self.live))
        return version

    def pull(self, server: LiveServer, number: int | None = None) -> None:
        """Takes a version off the server, or all of them when None; the base gets their share.

        Raises:
            ServerError: If there is no such version, or the server refuses.
        """
        gone = {self.version(number).name} if number is not None else set(self.live)
        live = {name: share for name, share in self.live.items() if name not in gone}
        self._go(server, live, "pull")

    def undo(self, server: LiveServer) -> None:
        """Goes back to what was live before the last push or pull that is not undone yet.

        Raises:
            ServerError: If there is none, or the server refuses.
        """
        for step in reversed(self.history):
            before = step["before"]
            if not step["undone"] and isinstance(before, dict):
                step["undone"] = True
                try:
                    self._go(server, {n: float(str(s)) for n, s in before.items()}, "undo")
                except BaseException:
                    step["undone"] = False
                    raise
                return
        raise ServerError(f"There is nothing to undo in `{self.folder}`.")

    def choose(self, key: str) -> str | None:
        """The version that answers a request, by a key; see ``choose``."""
        return choose(self.live, key)

    def _go(
        self, server: LiveServer, live: dict[str, float], action: str, keep: set[str] | None = None
    ) -> None:
        check_shares(live)
        named = {one.name: one for one in self.versions}
        loaded = {one.name for one in server.served()}
        for name in live:
            version = named.get(name)
            if version is None or folder_hash(self.path_of(version)) != version.sha256:
                raise ServerError(
                    f"The files of `{name}` in `{self.folder}` are not those that were written "
                    "there. Make the version anew, from its edits."
                )
            if name not in loaded:
                server.push(Path(self.seen_path_of(version)), name)
        rest = 1.0 - sum(live.values())
        newest = max(live, key=lambda name: (live[name], named[name].number), default=None)
        server.prefer(newest if newest is not None and live[newest] >= rest else None)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before: JSON = dict(self.live)
        if action != "undo":
            self.history.append({"action": action, "when": now, "before": before, "undone": False})
        self.live = live
        self._write()
        for name in sorted((loaded & set(named)) - set(live) - (keep or set())):
            server.pull(name)

    # -- the record ------------------------------------------------------------------------

    def _read(self) -> None:
        path = self.folder / RECORD
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = [{f.name: row[f.name] for f in fields(Version)} for row in found["versions"]]
            self.versions = [Version(**{**row, "edits": tuple(row["edits"])}) for row in rows]
            self.live = {str(name): float(share) for name, share in found["live"].items()}
            self.history = [
                {n: row[n] for n in ("action", "when", "before", "undone")}
                for row in found["history"]
            ]
            recorded = str(found["name"])
            names = [f"{recorded}-v{int(one.number)}" for one in self.versions]
            if found["format_version"] != 1 or names != [one.name for one in self.versions]:
                raise ValueError("it is of another format")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                f"The record `{path}` is damaged ({error!r}). Take it away to begin anew."
            ) from error
        if recorded != self.name:
            raise ServerError(
                f"`{self.folder}` holds versions of `{recorded}`, not of `{self.name}`. Give "
                "another `folder`, or that name."
            )

    def _write(self) -> None:
        record = {
            "format_version": 1,
            "name": self.name,
            "versions": [asdict(one) for one in self.versions],
            "live": self.live,
            "history": self.history,
        }
        with replacing(self.folder / RECORD) as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files in a folder, in hexadecimal.

    Args:
        folder: The folder.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> _ = (folder / "a").write_bytes(b"1")
        >>> before = folder_hash(folder)
        >>> _ = (folder / "a").write_bytes(b"2")
        >>> folder_hash(folder) == before
        False
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()
