# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole and on disk or not there, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_edit.core.errors import EditError, StorageError

__all__ = [
    "BINARY",
    "LOCKS_OPEN_FILES",
    "atomic_folder",
    "clean_up",
    "content_hash",
    "explained",
    "file_hash",
    "is_running",
    "replacing",
    "sync",
    "sync_folder",
    "umask",
]

#: For ``os.open``: Windows turns line ends into two characters otherwise.
BINARY: int = getattr(os, "O_BINARY", 0)
#: Whether files that are open or mapped into memory can be neither replaced nor moved.
LOCKS_OPEN_FILES = os.name == "nt"

_OLD = "-old"
_FAILED_WRITE = re.compile(r"os error \d+|PytorchStreamWriter failed|unexpected pos \d+ vs")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(record: Mapping[str, object]) -> str:
    """SHA-256 over what a JSON object says, whatever its layout, but for its own ``sha256``.

    Args:
        record: As JSON types.

    Examples:
        >>> content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1, "sha256": "…"})
        True
    """
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def is_running(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    if os.name == "nt":  # where a signal would end it
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x100000, False, pid)  # type: ignore[attr-defined]
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)  # type: ignore[attr-defined]
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def sync(path: Path) -> None:
    """Has a file, or a folder with all that is in it, lie on disk when this returns."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            if not inner.is_symlink():
                sync(inner)
        if os.name == "nt":  # knows no such thing of folders
            return
    # Windows flushes only what may be written.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clean_up(path: Path) -> None:
    """Removes what processes that have ended since left of writing a file or folder.

    A folder that one of them had moved away to replace it is put back.

    Args:
        path: What was written; it may be missing, and its folder, too.
    """
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}-{_machine()}-(\d+)-[0-9a-f]+({_OLD})?")
    for left in sorted(path.parent.iterdir()):
        found = pattern.fullmatch(left.name)
        if found is None or is_running(int(found[1])):
            continue
        with suppress(OSError):  # another process may do the same
            if found[2] and not path.exists() and (left / path.name).exists():
                os.replace(left / path.name, path)
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: the name of a file to write, which takes the place of another at its end.

    It is on disk then. If anything fails, what stood there is as it was.

    Args:
        path: The file; its folder is made if it is missing.

    Examples:
        >>> file = getfixture("tmp_path") / "a.txt"
        >>> with replacing(file) as part:
        ...     _ = part.write_text("whole")
        >>> file.read_text()
        'whole'
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_up(path)
        part = _beside(path)
        try:
            yield part
            _give_rights(part)
            sync(part)
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Context manager: a folder to fill, which takes the place of another when all went well.

    What stood there before is deleted then, and is as it was when anything fails. All is on disk
    when this ends.

    Args:
        folder: Made if it is missing.
        check: Raises if what stands there must not be deleted; called before and after the work.
    """
    named, folder = folder, folder.resolve()
    clean_up(folder)
    check(named)
    staging = _beside(folder)
    with explained(named), _emptied(staging):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for file in staging.rglob("*"):
            _give_rights(file)
        sync(staging)
        if folder.exists():
            check(folder)  # something may have been put there meanwhile
            retired = staging.with_name(f"{staging.name}{_OLD}")
            retired.mkdir()
            os.replace(folder, retired / folder.name)
            try:
                os.replace(staging, folder)
            except BaseException:
                os.replace(retired / folder.name, folder)
                retired.rmdir()
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(staging, folder)
        sync_folder(folder.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context manager: says in our own words that something cannot be written, and why.

    Args:
        path: What is written in it.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # torch and safetensors tell of the system's errors by words alone.
        is_ours = isinstance(error, OSError) and not isinstance(error, EditError)
        if not is_ours and not _FAILED_WRITE.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"`{path}` cannot be written: {reason}. What stood there before is as it was. Make "
            "room, or give a folder that may be written to, and run it again."
        ) from error


@contextmanager
def _emptied(staging: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name in the same folder that tells whose it is."""
    return path.with_name(f".{path.name}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _give_rights(path: Path) -> None:
    """Gives a file the rights that new files get: safetensors makes them private."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~umask())


def umask() -> int:
    """Which rights new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Has the names in a folder lie on disk when this returns."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
