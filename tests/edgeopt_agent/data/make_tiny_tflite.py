# SPDX-License-Identifier: Apache-2.0
"""Make tiny.tflite, the 2 kB network of test_runtimes_litert.py: needs edgeopt[litert]; run it in this folder.

Input args_0 float32 (1, 8, 8, 3), channels last; output output_0 float32 (1, 5).
"""

from pathlib import Path

import litert_torch
import torch


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.classifier = torch.nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.convolution(images))
        return self.classifier(features.mean(dim=(2, 3)))


if __name__ == "__main__":
    torch.manual_seed(0)
    module = litert_torch.to_channel_last_io(Tiny().eval(), args=[0])
    litert_torch.convert(module, (torch.zeros(1, 8, 8, 3),)).export(
        str(Path(__file__).with_name("tiny.tflite"))
    )
