# SPDX-License-Identifier: Apache-2.0
"""Packages of null models, extracted, with golden samples: what an agent finds in a slot."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_wire.document import canonical_bytes, to_bytes
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

IMAGE = TensorSpec("image", (1, 2, 4, 4), "float32", "NCHW")
SCORES = TensorSpec("scores", (1, 4), "float32")

MakePackage = Callable[..., Manifest]


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


@pytest.fixture
def make_package() -> MakePackage:
    return write_package


@pytest.fixture
def rewrite_package() -> MakePackage:
    return rewrite
