# SPDX-License-Identifier: Apache-2.0
"""Make tiny.pte, the 4 kB network of test_runtimes_executorch.py: needs edgeopt[executorch].

Input args_0 float32 (1, 3, 8, 8), channels first; output linear float32 (1, 5).
"""

from pathlib import Path


def network():
    import torch

    generator = torch.Generator().manual_seed(7)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator))
    return layers.eval()


def main():
    import torch

    from edgeopt_converters import path
    from edgeopt_converters.torch_program import program_model

    program = torch.export.export(network(), (torch.zeros(1, 3, 8, 8),))
    model = path.convert(program_model(program, name="tiny"), "executorch")
    (Path(__file__).parent / "tiny.pte").write_bytes(model.program)


if __name__ == "__main__":
    main()
