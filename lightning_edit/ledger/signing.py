# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Signatures of rows: Ed25519, by the package cryptography."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.core.errors import LedgerError, MissingDependencyError
from lightning_edit.core.files import BINARY

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["Signer", "is_signed", "new_key", "public_key"]


class Signer:
    """Signs hashes with a private key.

    Args:
        path: A PEM file with an Ed25519 key, without a password.

    Raises:
        LedgerError: If there is no such key in it.
        MissingDependencyError: If cryptography is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self._key = _private_key(Path(path))
        self.public_key = self._key.public_key().public_bytes_raw().hex()

    def sign(self, digest: str) -> str:
        """The signature of a hash, in hexadecimal."""
        return self._key.sign(digest.encode()).hex()


def is_signed(digest: str, signature: str, key: str) -> bool:
    """Whether a signature is that of a hash by the owner of a key.

    Args:
        digest: The hash.
        signature: In hexadecimal.
        key: The public key, in hexadecimal.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise _missing() from None
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), digest.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def new_key(path: str | Path) -> str:
    """Makes a private key in a file that only its owner can read.

    Args:
        path: The file, which must not be there yet.

    Returns:
        The public key, in hexadecimal, by which ``verify`` knows the signatures.

    Raises:
        LedgerError: If there is a file already.

    Examples:
        >>> file = getfixture("tmp_path") / "key.pem"
        >>> new_key(file) == public_key(file)
        True
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise _missing() from None
    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o600)
    except FileExistsError:
        raise LedgerError(f"`{path}` is there already. Give another file for the key.") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
    return public_key(path)


def public_key(key: str | Path) -> str:
    """A public key in hexadecimal.

    Args:
        key: The key itself, or a PEM file with it or with the private one.

    Raises:
        LedgerError: If it is neither.
    """
    if len(str(key)) == 64 and not Path(key).exists():
        return str(key).lower()
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise _missing() from None
    try:
        found = load_pem_public_key(Path(key).read_bytes())
    except OSError as error:
        raise LedgerError(f"The key `{key}` cannot be read: {error}.") from None
    except ValueError:
        return _private_key(Path(key)).public_key().public_bytes_raw().hex()
    if not isinstance(found, Ed25519PublicKey):
        raise LedgerError(f"The key in `{key}` is not of Ed25519. Make one with `new_key`.")
    return found.public_bytes_raw().hex()


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise _missing() from None
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"The key `{path}` cannot be read: {error}. It is expected to be a PEM file with an "
            "Ed25519 key, without a password, such as `lightning_edit.ledger.signing.new_key` "
            "makes."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerError(f"The key in `{path}` is not of Ed25519. Make one with `new_key`.")
    return key


def _missing() -> MissingDependencyError:
    return MissingDependencyError("cryptography", "ledger", "Signing a ledger")
