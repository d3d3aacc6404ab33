# SPDX-License-Identifier: Apache-2.0
"""Signing keys as files: Ed25519, one for each role (several of root), mode 0600, with a passphrase if wanted.

| key | signs | where it belongs |
|---|---|---|
| root | which keys count | offline, in two places |
| targets | which packages exist | offline, with whoever releases models |
| snapshot, timestamp | that nothing is missing or old | beside the repository |
| director | which device runs which package | with the control plane |
| builder | how a package was made | with whoever builds |
| a team's | that team's models | with the team |

A key that others may read is refused, as ssh does. Keys never enter the repository of packages.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError, StoreError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

ROLES = ("root", "targets", "snapshot", "timestamp", "director")
BUILDER = "builder"
MAX_ROOT_KEYS = 9
PASSPHRASE_VARIABLE = "EDGEOPT_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

Ask = Callable[[str], str]
"""Asks a person for the passphrase of a key file."""


def create_keys(folder: Path, passphrase: str = "", *, root_keys: int = 1) -> Mapping[str, str]:
    """Make one key a role below `folder` (root, root-2, ... of root) and the builder's; return name -> key id.

    Raises:
        RecipeError: A key is there already; it is never overwritten.
        StoreError: The disk refused.
    """
    names = [*ROLES, *(root_name(number) for number in range(2, root_keys + 1)), BUILDER]
    if not 1 <= root_keys <= MAX_ROOT_KEYS:
        raise RecipeError(f"1 to {MAX_ROOT_KEYS} root keys can be made, asked for were {root_keys}")
    there = [role for role in names if key_path(folder, role).exists()]
    if there:
        raise RecipeError(
            f"{key_path(folder, there[0])} is there already, and losing a key is worse than making none; "
            "choose another folder"
        )
    made = {name: create_key(folder, name, passphrase) for name in names}
    _write_public(folder / f"{BUILDER}.pub", made[BUILDER].public_key)
    return {name: signer.public_key.keyid for name, signer in made.items()}


def create_key(folder: Path, name: str, passphrase: str = "") -> CryptoSigner:
    """Make one key, which must not be there.

    Raises:
        RecipeError: It is there already.
        StoreError: The disk refused.
    """
    from securesystemslib.signer import CryptoSigner

    signer = CryptoSigner.generate_ed25519()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(key_path(folder, name), _encoded(signer, passphrase))
    except FileExistsError as error:
        raise RecipeError(
            f"{key_path(folder, name)} is there already, and losing a key is worse than making none; "
            "choose another folder"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot write keys to {folder}: {error.strerror}") from error
    return signer


def ensure_key(folder: Path, role: str, number: int = 1, passphrase: str = "") -> CryptoSigner:
    """The key of a role in a folder, made if it is not there: what was interrupted goes on with the same keys."""
    name = root_name(number) if role == "root" else role
    if key_path(folder, name).exists():
        return load_signer(folder, name, lambda _: passphrase)
    return create_key(folder, name, passphrase)


def root_name(number: int) -> str:
    """The name of root key 1, 2, ...: `root`, `root-2`, ..."""
    return "root" if number == 1 else f"root-{number}"


def root_signers(folders: Sequence[Path], ask: Ask | None = None) -> tuple[CryptoSigner, ...]:
    """Every root key in these folders.

    Raises:
        StoreError: Others may read one of them.
        TrustError: A passphrase is wrong.
    """
    found = []
    for folder in folders:
        for number in range(1, MAX_ROOT_KEYS + 1):
            name = root_name(number)
            if key_path(folder, name).exists():
                found.append(load_signer(folder, name, ask))
    return tuple(found)


def find_signer(
    folders: Sequence[Path], role: str, keyids: Sequence[str] = (), ask: Ask | None = None
) -> CryptoSigner:
    """The key of a role in the first folder that has it, and where `keyids` are given, one of those.

    Raises:
        StoreError: No folder has it, or others may read it.
        TrustError: Only other keys of that role are there, or a passphrase is wrong.
    """
    there = [folder for folder in folders if key_path(folder, role).exists()]
    found = [load_signer(folder, role, ask) for folder in there]
    for signer in found:
        if not keyids or signer.public_key.keyid in keyids:
            return signer
    listed = ", ".join(str(folder) for folder in folders)
    if found:
        raise TrustError(
            f"the {role} key {found[0].public_key.keyid[:12]} in {there[0]} is none of this repository, whose root "
            f"names {', '.join(keyid[:12] for keyid in keyids)}; give the --keys that it was made with"
        )
    raise StoreError(f"there is no {role}.pem in {listed}; give the folder that has it with --keys")


def load_signer(folder: Path, role: str, ask: Ask | None = None) -> CryptoSigner:
    """Load the private key of a role; an encrypted one takes `$EDGEOPT_KEY_PASSPHRASE`, else asks.

    Raises:
        StoreError: It is not there, or others may read it.
        TrustError: The passphrase is wrong, or the file is no key.
    """
    from securesystemslib.signer import CryptoSigner

    return CryptoSigner(load_private_key(key_path(folder, role), ask))


def load_private_key(path: Path, ask: Ask | None = None, *, made_by: str = "") -> Any:
    """Load a private key file; an encrypted one takes `$EDGEOPT_KEY_PASSPHRASE`, else asks. `made_by` makes a new one.

    Raises:
        StoreError: It is not there, or others may read it.
        TrustError: The passphrase is wrong, or the file is no key.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read_private(path, made_by or f"make keys with `edgeopt keys create {path.parent}`")
    passphrase = ""
    if b"ENCRYPTED" in pem:
        passphrase = os.environ.get(PASSPHRASE_VARIABLE, "") or (ask(str(path)) if ask else "")
        if not passphrase:
            raise TrustError(f"{path} has a passphrase; set {PASSPHRASE_VARIABLE}")
    try:
        return load_pem_private_key(pem, passphrase.encode() or None)
    except (ValueError, TypeError) as error:
        raise TrustError(f"{path} cannot be opened: wrong passphrase, or no PKCS #8 key ({error})") from error


def key_path(folder: Path, role: str) -> Path:
    """Where the key of a role lies."""
    return folder / f"{role}.pem"


def _read_private(path: Path, advice: str) -> bytes:
    try:
        mode = path.stat().st_mode
        if mode & _OTHERS:
            raise StoreError(
                f"{path} has mode {stat.S_IMODE(mode):04o}: others may read this private key; run `chmod 600 {path}`, "
                "and make new keys if somebody may have read it"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"there is no key {path}; {advice}") from error
    except OSError as error:
        raise StoreError(f"cannot read the key {path}: {error.strerror}") from error


def _encoded(signer: CryptoSigner, passphrase: str) -> bytes:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not passphrase:
        return bytes(signer.private_bytes)
    return encoded_key(load_pem_private_key(signer.private_bytes, None), passphrase)


def encoded_key(key: Any, passphrase: str = "") -> bytes:
    """A private key as PKCS #8 PEM, encrypted where there is a passphrase."""
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    protection = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    return pem


def _write_public(path: Path, key: Any) -> None:
    """A public key as a file to hand out: who checks provenance needs the builder's."""
    try:
        path.write_bytes(canonical_bytes({"keyid": key.keyid, **key.to_dict()}) + b"\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def write_private(path: Path, pem: bytes) -> None:
    """Write a private key to a new file that only its owner reads, flushed to the disk.

    Raises:
        FileExistsError: It is there already; a key is never overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
