# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The saved edits beside a ledger: folders named by the hash of what they hold."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, LedgerError
from lightning_edit.core.files import file_hash, sync_folder
from lightning_edit.core.storage import CARD, CONFIG, TENSORS

__all__ = ["DeltaFolder"]

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".new-"


class DeltaFolder:
    """Saved edits, each in a folder that is named by its content and never changed.

    Args:
        folder: Where they lie; made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, edit: Edit, *, originals: bool) -> str:
        """Saves an edit, whole and on the disk when this returns, or not at all.

        Args:
            edit: The edit.
            originals: Keep what it replaces with it, which undoing it takes.

        Returns:
            The name of its folder: the hash of its content.

        Raises:
            LedgerError: If it cannot be written, such as on a full disk.
        """
        from safetensors import SafetensorError

        try:
            return self._write(edit, originals=originals)
        except (OSError, SafetensorError) as error:
            raise LedgerError(
                f"The edit cannot be saved in `{self.folder}`: {error}. Nothing was added to the "
                "ledger. Make room on the disk, or the folder writable, and go on."
            ) from error

    def _write(self, edit: Edit, *, originals: bool) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            saved = edit.save(staging / "delta", originals=originals)  # is on the disk then
            name = content_hash(saved)
            if not (self.folder / name).exists():
                os.replace(saved, self.folder / name)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return name

    def path(self, name: str) -> Path:
        """The folder of a saved edit.

        Raises:
            LedgerError: If the name is no hash, and so might lead elsewhere.
        """
        if not _NAME.fullmatch(name):
            raise LedgerError(f"{name!r} is not the name of a saved edit of this ledger.")
        return self.folder / name

    def load(self, name: str) -> Edit:
        """Reads a saved edit whose content is what its name says.

        Raises:
            LedgerError: If it is missing, or was changed.
        """
        if problem := self.problem(name):
            raise LedgerError(f"{problem}. Restore `{self.folder}` from a backup.")
        try:
            return Edit.load(self.path(name))
        except ArtifactError as error:
            raise LedgerError(str(error)) from error

    def size(self, name: str) -> int:
        """Bytes of a saved edit's files."""
        return sum(path.stat().st_size for path in self.path(name).iterdir())

    def problem(self, name: str) -> str:
        """What is wrong with a saved edit; empty where nothing is."""
        if not _NAME.fullmatch(name):
            return f"{name[:80]!r} is no hash of a saved edit"
        try:
            found = content_hash(self.folder / name)
        except FileNotFoundError:
            return f"the saved edit {name[:12]}… is missing"
        except OSError as error:
            return f"the saved edit {name[:12]}… cannot be read ({error})"
        return "" if found == name else f"the saved edit {name[:12]}… was changed"

    def strays(self, kept: Collection[str]) -> list[Path]:
        """What an interrupted process has left: saved edits, whole or not, that no row names.

        Args:
            kept: The names that rows know.
        """
        if not self.folder.is_dir():
            return []
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.name not in kept
            and (_NAME.fullmatch(path.name) or path.name.startswith(_UNFINISHED))
        ]


def content_hash(folder: Path) -> str:
    """SHA-256 over the names and hashes of a saved edit's files, in hexadecimal.

    Raises:
        OSError: If one of them is missing.
    """
    lines = [f"{name} {file_hash(folder / name)}" for name in (CARD, CONFIG, TENSORS)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
