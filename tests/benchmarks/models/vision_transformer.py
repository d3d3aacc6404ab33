# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer, trained here on CIFAR-10: no package was found that ships a trained one.

Dosovitskiy et al. 2021 with the convolutional stem of Xiao et al. 2021 (it learns in few epochs), and half of the
tokens left out in training (Liu et al. 2023, "PatchDropout"), which halves its cost. Same seed, same machine: same
model. Minutes on one core; kept afterwards.
"""

from __future__ import annotations

from typing import Any

from pictures import read_cifar

from models import CALIBRATION, EVALUATION, About, Place, write_samples, write_torch

NAMES = ("vision-transformer",)
SIDE, WIDTH, DEPTH, HEADS = 8, 192, 4, 3
KEPT = 32
"""Tokens of 64 that a training step sees."""
EPOCHS, BATCH, RATE, SEED = 4, 64, 1.5e-3, 0


def prepare(place: Place) -> About:
    import torch

    pictures, classes = read_cifar(place.data("cifar10/cifar10-train-20k.zip"))
    test, labels = read_cifar(place.data("cifar10/cifar10-test-5k.zip"))
    module = _train(_scaled(pictures), classes)
    files, notes, (name,) = write_torch(place, module, (torch.zeros(1, 3, 32, 32),))
    chosen = slice(0, None, len(pictures) // 128)
    write_samples(place.folder / CALIBRATION, {name: _scaled(pictures[chosen][:128])})
    write_samples(place.folder / EVALUATION, {name: _scaled(test[::4])}, labels[::4])
    description = (
        f"Vision transformer, {SIDE * SIDE} tokens of {WIDTH}, {DEPTH} blocks, trained on CIFAR-10; 128 training "
        f"pictures calibrate, {len(labels[::4])} test pictures evaluate"
    )
    return About(description, "classification", files, bits=(4,), notes=notes)


def _scaled(pictures: Any) -> Any:
    return pictures / 127.5 - 1


def _net() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        """Attention and perceptron, each behind a norm and added to its input."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.middle = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.joined = nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            """Tokens (batch, tokens, width) in and out."""
            y = self.before(x)
            q, k, v = (
                part(y).unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            seen = torch.softmax(q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5, 3)
            x = x + self.joined((seen @ v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.middle(x))))

    class Net(nn.Module):
        """Pictures (batch, 3, 32, 32) of -1 to 1 give 10 logits."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(3, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
                nn.Conv2d(48, WIDTH, 3, 2, 1),
            )  # fmt: skip
            self.place = nn.Parameter(torch.randn(1, SIDE * SIDE, WIDTH) * 0.02)
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
            self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

        def forward(self, x: Any) -> Any:
            """Give the logits."""
            x = self.stem(x).flatten(2).transpose(1, 2) + self.place
            if self.training:
                x = x[:, torch.randperm(SIDE * SIDE)[:KEPT]]
            for block in self.blocks:
                x = block(x)
            return self.head(self.last(x).mean(1))

    return Net()


def _train(pictures: Any, classes: Any) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    net = _net()
    x, y = torch.from_numpy(pictures), torch.from_numpy(classes)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(net(_moved(x[chosen])), y[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net.eval()


def _moved(x: Any) -> Any:
    """Shifted by up to 3 pixels, mirrored every second time."""
    import torch

    padded = torch.nn.functional.pad(x, (3, 3, 3, 3))
    top, left, mirrored = (int(torch.randint(0, end, ())) for end in (7, 7, 2))
    cut = padded[:, :, top : top + 32, left : left + 32]
    return cut.flip(3) if mirrored else cut
