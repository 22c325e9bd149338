# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A file that grows record by record, so that keeping up with a run costs what is new in it."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.files import sync_folder

__all__ = ["AppendLog", "appended_to", "read_log"]

_SIZE = struct.Struct("<QI")  # bytes of a record, and the CRC-32 of that number
_DIGEST = hashlib.sha256().digest_size


class AppendLog:
    """Writes records to the end of a file, each on disk when ``append`` returns.

    The file begins with what it belongs to. Each record has a checksum over itself and all before
    it. One that was not written to its end is not there: the next one takes its place.

    Args:
        path: The file; what it held is gone with the first record.
        owner: SHA-256 in hexadecimal of what the records add to.

    Examples:
        >>> path, owner = getfixture("tmp_path") / "log", "ab" * 32
        >>> log = AppendLog(path, owner)
        >>> log.append(b"one")
        >>> log.append(b"two")
        >>> read_log(path, owner)
        [b'one', b'two']
        >>> _ = path.write_bytes(path.read_bytes()[:-1])  # as an interrupted write leaves it
        >>> read_log(path, owner)
        [b'one']
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        #: Bytes that are written.
        self.size = 0
        self._digest = bytes.fromhex(owner)

    def append(self, record: bytes) -> None:
        """Writes a record.

        Args:
            record: Any bytes.

        Raises:
            OSError: If the disk does not take it. The records before are as they were.
        """
        digest = hashlib.sha256(self._digest + record).digest()
        begins = b"" if self.size else self._digest
        with open(self.path, "r+b" if self.size else "wb") as file:
            file.seek(self.size)
            file.write(begins + _sized(len(record)) + digest + record)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            end = file.tell()
        if not self.size:
            sync_folder(self.path.parent)
        self.size, self._digest = end, digest


def appended_to(file: Path) -> Path:
    """The log of what is added to a file, beside it."""
    return file.with_name(f"{file.name}.edits")


def read_log(path: Path, owner: str) -> list[bytes]:
    """The records that were written to a file to their end; none if it belongs to something else.

    Args:
        path: The file; it need not exist.
        owner: SHA-256 in hexadecimal of what the records add to.

    Raises:
        ArtifactError: If a record is not what was written.
    """
    data = path.read_bytes() if path.is_file() else b""
    digest = bytes.fromhex(owner)
    if data[:_DIGEST] != digest:
        return []
    records, at = [], _DIGEST
    while len(data) - at >= _SIZE.size + _DIGEST:
        size, _ = _SIZE.unpack_from(data, at)
        if data[at : at + _SIZE.size] != _sized(size):
            if not any(data[at:]):
                break  # the file grew, but nothing was written there before it ended
            raise _damaged(path)
        start = at + _SIZE.size + _DIGEST
        record = data[start : start + size]
        if len(record) < size:
            break
        digest = hashlib.sha256(digest + record).digest()
        if digest != data[at + _SIZE.size : start]:
            raise _damaged(path)
        records.append(record)
        at = start + size
    return records


def _sized(size: int) -> bytes:
    return _SIZE.pack(size, zlib.crc32(size.to_bytes(8, "little")))


def _damaged(path: Path) -> ArtifactError:
    return ArtifactError(
        f"`{path}` is damaged: it does not hold what was written, by its checksums. Restore it "
        "from a backup, or take it away to go on from the checkpoint beside it, which is older."
    )
