# SPDX-License-Identifier: Apache-2.0
"""Signing keys as files: one Ed25519 key for each role, mode 0600, with a passphrase if the user wants one.

| key | signs | where it belongs |
|---|---|---|
| root | which keys count | offline, in two places |
| targets | which packages exist | offline, with whoever releases models |
| snapshot, timestamp | that nothing is missing or old | beside the repository |
| director | which device runs which package | with the control plane |

A key that others may read is refused, as ssh does. Keys never enter the repository of packages.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_wire.errors import RecipeError, StoreError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

ROLES = ("root", "targets", "snapshot", "timestamp", "director")
PASSPHRASE_VARIABLE = "EDGEOPT_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

Ask = Callable[[str], str]
"""Asks a person for the passphrase of a key file."""


def create_keys(folder: Path, passphrase: str = "") -> Mapping[str, str]:
    """Make one key a role below `folder`; return role -> key id.

    Raises:
        RecipeError: A key is there already; it is never overwritten.
        StoreError: The disk refused.
    """
    from securesystemslib.signer import CryptoSigner

    there = [role for role in ROLES if key_path(folder, role).exists()]
    if there:
        raise RecipeError(
            f"{key_path(folder, there[0])} is there already, and losing a key is worse than making none; "
            "choose another folder"
        )
    found = {}
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for role in ROLES:
            signer = CryptoSigner.generate_ed25519()
            _write_private(key_path(folder, role), _encoded(signer, passphrase))
            found[role] = signer.public_key.keyid
    except OSError as error:
        raise StoreError(f"cannot write keys to {folder}: {error.strerror}") from error
    return found


def load_signer(folder: Path, role: str, ask: Ask | None = None) -> CryptoSigner:
    """Load the private key of a role; an encrypted one takes `$EDGEOPT_KEY_PASSPHRASE`, else asks.

    Raises:
        StoreError: It is not there, or others may read it.
        TrustError: The passphrase is wrong, or the file is no key.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    path = key_path(folder, role)
    pem = _read_private(path)
    passphrase = ""
    if b"ENCRYPTED" in pem:
        passphrase = os.environ.get(PASSPHRASE_VARIABLE, "") or (ask(str(path)) if ask else "")
        if not passphrase:
            raise TrustError(f"{path} has a passphrase; set {PASSPHRASE_VARIABLE}")
    try:
        key = load_pem_private_key(pem, passphrase.encode() or None)
        return CryptoSigner(key)
    except (ValueError, TypeError) as error:
        raise TrustError(f"{path} cannot be opened: wrong passphrase, or no PKCS #8 key ({error})") from error


def key_path(folder: Path, role: str) -> Path:
    """Where the key of a role lies."""
    return folder / f"{role}.pem"


def _read_private(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if mode & _OTHERS:
            raise StoreError(
                f"{path} has mode {stat.S_IMODE(mode):04o}: others may read this private key; run `chmod 600 {path}`, "
                "and make new keys if somebody may have read it"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no key {path}; make keys with `edgeopt keys create {path.parent}`"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot read the key {path}: {error.strerror}") from error


def _encoded(signer: CryptoSigner, passphrase: str) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    if not passphrase:
        return bytes(signer.private_bytes)
    key = load_pem_private_key(signer.private_bytes, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase.encode()))


def _write_private(path: Path, pem: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
