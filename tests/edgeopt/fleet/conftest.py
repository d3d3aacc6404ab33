# SPDX-License-Identifier: Apache-2.0
"""Signing keys, tiny packages and a published repository, all real and made in milliseconds."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edgeopt.keys import create_keys
from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import canonical_bytes, to_bytes
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

MakePackage = Callable[..., Path]


@pytest.fixture
def noon() -> datetime:
    return datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signing") / "keys"
    create_keys(folder)
    return folder


@pytest.fixture
def make_package(tmp_path: Path) -> MakePackage:
    """Write a package of one null model; `weights` only makes it larger or different."""

    def make(
        name: str = "tiny",
        version: str = "1",
        device: str = "host",
        weights: bytes = b"",
        classes: tuple[str, ...] = (),
    ) -> Path:
        files = {
            "variants/a.json": canonical_bytes({"schema": "edgeopt.null-model/1"}),
            "golden/inputs/0.npy": b"golden",
        }
        if weights:
            files["variants/weights.bin"] = weights
        manifest = Manifest(
            name=name,
            version=version,
            device=device,
            compatible=Compatible(classes or (device,)),
            signature_inputs=(TensorSpec("image", (1, 4), "float32"),),
            signature_outputs=(TensorSpec("scores", (1, 2), "float32"),),
            variants=(
                Variant(
                    id="a",
                    runtime="null",
                    precision="fp32",
                    file="variants/a.json",
                    inputs=(TensorSpec("image", (1, 4), "float32"),),
                    outputs=(TensorSpec("scores", (1, 2), "float32"),),
                    golden="golden/outputs/a",
                    min_sqnr_db=30.0,
                ),
            ),
            files=tuple(
                FileEntry(path, len(content), hashlib.sha256(content).hexdigest())
                for path, content in sorted(files.items())
            ),
            golden_inputs="golden/inputs",
            baseline={},
            provenance=Provenance("0" * 64, "0" * 64),
        )
        path = tmp_path / f"{name}-{version}-{device}-{hashlib.sha256(weights).hexdigest()[:8]}.edgeopt"
        with path.open("w+b") as file:
            write_archive(file, {"manifest.json": to_bytes(manifest), **files})
        return path

    return make
