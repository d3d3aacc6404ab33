# SPDX-License-Identifier: Apache-2.0
"""Packages of null models with golden samples, and a signed repository of them with its director."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from edgeopt.keys import create_keys, load_signer
from edgeopt.publish import publish
from edgeopt.repository import Repository
from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import canonical_bytes, to_bytes
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.messages import DESIRED_TYPE, Desired, DesiredModel
from edgeopt_wire.tensor import TensorSpec

IMAGE = TensorSpec("image", (1, 2, 4, 4), "float32", "NCHW")
SCORES = TensorSpec("scores", (1, 4), "float32")


def null_outputs(images: np.ndarray, gain: float = 1.0, bias: float = 0.0) -> np.ndarray:
    """What the null runtime's documentation promises for SCORES, computed another way."""
    rows = images.reshape(len(images), 4, -1).astype(np.float64)
    return (gain * rows.mean(axis=2) + bias).astype(np.float32)


def write_package(
    folder: Path,
    models: Mapping[str, Mapping[str, Any]],
    *,
    golden_outputs: np.ndarray | None = None,
    min_sqnr_db: float = 30.0,
    variants: Sequence[Variant] = (),
    samples: int = 3,
    name: str = "tiny",
    version: str = "1",
) -> Manifest:
    """Write a package of null models by variant id (and other `variants`, whose files are there) into `folder`."""
    images = np.random.default_rng(7).normal(size=(samples, *IMAGE.shape[1:])).astype(np.float16)
    expected = null_outputs(images.astype(np.float32)) if golden_outputs is None else golden_outputs
    made = list(variants)
    for variant_id, fields in models.items():
        file = folder / f"variants/{variant_id}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(canonical_bytes({"schema": "edgeopt.null-model/1", **fields}))
        made.append(
            Variant(
                id=variant_id,
                runtime="null",
                precision="fp32",
                file=f"variants/{variant_id}.json",
                inputs=(IMAGE,),
                outputs=(SCORES,),
                golden="golden/outputs/tiny",
                min_sqnr_db=min_sqnr_db,
            )
        )
    for path, array in (("golden/inputs/0.npy", images), ("golden/outputs/tiny/0.npy", expected)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / path, array)
    files = tuple(
        FileEntry(
            path.relative_to(folder).as_posix(),
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    )
    manifest = Manifest(
        name=name,
        version=version,
        device="host",
        compatible=Compatible(("host",)),
        signature_inputs=(IMAGE,),
        signature_outputs=(SCORES,),
        variants=tuple(made),
        files=files,
        golden_inputs="golden/inputs",
        baseline={},
        provenance=Provenance("0" * 64, "0" * 64),
    )
    (folder / "manifest.json").write_bytes(to_bytes(manifest))
    return manifest


def rewrite(folder: Path, manifest: Manifest, **changes: Any) -> Manifest:
    """Change every variant of a written package, e.g. `rewrite(folder, manifest, threads=2)`."""
    changed = replace(manifest, variants=tuple(replace(variant, **changes) for variant in manifest.variants))
    (folder / "manifest.json").write_bytes(to_bytes(changed))
    return changed


class Publisher:
    """Keys, a repository folder and a director, made with the SDK; `now` is when things are signed."""

    def __init__(self, folder: Path, now: datetime | None = None) -> None:
        self.folder = folder
        self.keys, self.repository = folder / "keys", folder / "repository"
        self.now = now or datetime.now(UTC).replace(microsecond=0)
        create_keys(self.keys)

    def add(self, version: str = "1", **options: Any) -> PackageIndex:
        """Publish a package of one null model; `options` go to the null model."""
        work = self.folder / f"package-{version}"
        changes = {key: options.pop(key) for key in ("compatible",) if key in options}
        manifest = write_package(work, {"a": options}, version=version)
        if changes:
            manifest = replace(manifest, **changes)
            (work / "manifest.json").write_bytes(to_bytes(manifest))
        path = self.folder / f"tiny-{version}-host.edgeopt"
        with path.open("w+b") as file:
            write_archive(file, {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()})
        return publish(path, self.repository, self.keys, now=self.now).index

    def freshen(self) -> bool:
        """Sign snapshot and timestamp again as of `now`, as the running control plane does."""
        signers = {role: load_signer(self.keys, role) for role in ("snapshot", "timestamp")}
        return Repository(self.repository, signers, self.now).freshen()

    @property
    def root(self) -> Path:
        return self.repository / "metadata" / "1.root.json"

    def files(self) -> dict[str, bytes]:
        """Metadata and targets by their names in the repository."""
        found = [
            p for part in ("metadata", "targets") for p in (self.repository / part).rglob("*") if p.is_file()
        ]
        return {path.relative_to(self.repository).as_posix(): path.read_bytes() for path in found}

    def blobs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.repository / "blobs").iterdir()}

    def desire(
        self,
        revision: int,
        *versions: str,
        device: str = "d1",
        rollout: str = "",
        role: str = "director",
        lifetime: timedelta = timedelta(days=7),
        payload_type: str = DESIRED_TYPE,
    ) -> bytes:
        """A signed document that wants `versions` of tiny (one or none)."""
        from securesystemslib.dsse import Envelope

        models = tuple(DesiredModel("tiny", v, f"models/tiny/{v}/host.json", rollout) for v in versions)
        desired = Desired(device, revision, self.now, self.now + lifetime, models)
        envelope = Envelope(to_bytes(desired), payload_type, {})
        envelope.sign(load_signer(self.keys, role))
        return json.dumps(envelope.to_dict()).encode()
