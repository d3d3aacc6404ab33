# SPDX-License-Identifier: Apache-2.0
"""Microsoft's Olive: its quantization passes over the ONNX file, as `olive run` calls them with a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from work import Work

VARIANTS = {
    "static": "olive, static, defaults",
    "static-channels": "olive, static, U8S8 per channel",
    "dynamic": "olive, dynamic",
    "int4-rtn": "olive, int4 weights, nearest",
    "int4-hqq": "olive, int4 weights, HQQ",
    "int4-kquant": "olive, int4 weights, k-quant",
}
IMPORTS = ("onnx", "onnxruntime.quantization", "olive.model", "olive.data.config", "olive.passes.olive_pass")
DATA = "bench_samples"
GROUP = 64


def make(work: Work) -> Path:
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes.olive_pass import create_pass_from_dict

    name, settings = _settings(work)
    kind = OlivePackageConfig.load_default_config().import_pass_module(name)
    made = create_pass_from_dict(kind, settings, disable_search=True).run(
        ONNXModelHandler(str(work.source("onnx"))), str(work.output("made"))
    )
    return Path(made.model_path)


def _settings(work: Work) -> tuple[str, dict[str, Any]]:
    if work.variant == "dynamic":
        return "OnnxDynamicQuantization", {}
    if work.variant == "int4-rtn":
        return "OnnxBlockWiseRtnQuantization", {
            "block_size": GROUP,
            "is_symmetric": True,
            "accuracy_level": 4,
        }
    if work.variant == "int4-hqq":
        return "OnnxHqqQuantization", {"block_size": GROUP}
    if work.variant == "int4-kquant":
        return "OnnxKQuantQuantization", {"block_size": GROUP}
    static: dict[str, Any] = {"data_config": _data(work)}
    if work.variant == "static-channels":
        static |= {"per_channel": True, "activation_type": "uint8", "precision": "int8"}
    return "OnnxStaticQuantization", static


def _data(work: Work) -> dict[str, Any]:
    """The samples as Olive takes them: a data set and a loader that are registered by name."""
    from olive.data.registry import Registry

    @Registry.register_dataset(DATA)  # type: ignore[untyped-decorator, unused-ignore]
    def dataset(**_: Any) -> list[tuple[dict[str, Any], int]]:
        return [(sample, 0) for sample in work.samples()]

    @Registry.register_dataloader(f"{DATA}_loader")  # type: ignore[untyped-decorator, unused-ignore]
    def loader(dataset: Any, **_: Any) -> _Loader:
        return _Loader(dataset)

    return {
        "name": DATA,
        "load_dataset_config": {"type": DATA},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": f"{DATA}_loader"},
    }


class _Loader:
    """Goes through the samples; ready-made batches of one."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)
