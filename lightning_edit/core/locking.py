# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a folder: a lock that tells who holds it, and ends with its holder."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

from lightning_edit.core.documents import parse_json
from lightning_edit.core.errors import LockedError
from lightning_edit.core.files import explained, is_running

__all__ = ["LOCK", "FolderLock"]

#: Name of the file by which a folder is locked.
LOCK = ".lightning_edit.lock"

# What the system says where another holds the lock, and where it knows no locks.
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


class FolderLock:
    """The right of one run to write into a folder.

    The operating system holds the lock, and lets it go when the process ends, however it ends. The
    file tells others who has it.

    Args:
        folder: Made if it is missing.

    Raises:
        LockedError: If another run holds it; the message names its process, machine and command.
        StorageError: If the folder may not be written to.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> lock = FolderLock(folder)
        >>> FolderLock(folder)
        Traceback (most recent call last):
            ...
        lightning_edit.core.errors.LockedError: `...` is in use by process ...
        >>> lock.release()
        >>> FolderLock(folder).release()
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.resolve() / LOCK
        self._handle: int | None = None
        with explained(folder):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._handle is None:
                self._handle = self._taken()

    def _taken(self) -> int | None:
        """The open file, locked; None if its last holder took it away meanwhile."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                _lock(handle)
            except OSError as error:
                if error.errno in _HELD:
                    raise LockedError(self._in_use()) from None
                if error.errno not in _UNKNOWN:
                    raise
                self._check_holder()
            if not self._is_at(handle):
                os.close(handle)
                return None
            # From the second byte on: Windows lets nobody read the first.
            os.ftruncate(handle, 0)
            os.write(handle, b" " + json.dumps(_holder()).encode())
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        return handle

    def release(self) -> None:
        """Lets the folder go; a second time nothing happens."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if self._is_at(handle):
            with suppress(OSError):  # Windows removes no open files
                self.path.unlink()
        os.close(handle)

    def _is_at(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except OSError:
            return False

    def _check_holder(self) -> None:
        """Goes by the file alone, where the file system knows no locks."""
        found = self._found()
        if found.get("host") == platform.node() and is_running(int(str(found.get("pid", 0)))):
            raise LockedError(self._in_use())

    def _found(self) -> dict[str, object]:
        try:
            with self.path.open("rb") as file:
                file.seek(1)
                found = parse_json(file.read())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _in_use(self) -> str:
        found = self._found()
        who = "another process"
        if found:
            who = (
                f"process {found.get('pid')} on {found.get('host')} since {found.get('since')} "
                f"(`{found.get('command')}`)"
            )
        return (
            f"`{self.path.parent}` is in use by {who}, whose results would be lost. Wait until it "
            "has ended, end it, or give this run another folder (`--trainer.default_root_dir`)."
        )


def _holder() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
