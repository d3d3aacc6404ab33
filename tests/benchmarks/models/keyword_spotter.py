# SPDX-License-Identifier: Apache-2.0
"""A keyword spotter, DS-CNN-S (Zhang et al. 2017, "Hello Edge", table 5), trained here on spoken digits.

Data: the Free Spoken Digit Dataset (CC BY-SA 4.0), 8 kHz. Takes 0 to 4 of each speaker and digit evaluate, as the data
set's own split does, the others train; calibration is of those that trained. Same seed, same machine: same model.
"""

from __future__ import annotations

import io
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from models import CALIBRATION, EVALUATION, About, Place, write_samples, write_torch

NAMES = ("keyword-spotter",)
RATE, WINDOW, HOP, BANDS, FRAMES = 8000, 256, 160, 40, 49
TEST_TAKES = 5
EPOCHS, BATCH, SEED = 6, 32, 0


def prepare(place: Place) -> About:
    import torch

    train, labels, test, test_labels = _features(place.data("fsdd/fsdd-4-speakers.zip"))
    module = _train(train, labels)
    files, notes, (name,) = write_torch(place, module, (torch.zeros(1, 1, FRAMES, BANDS),))
    chosen = np.random.default_rng(SEED).permutation(len(train))[:128]
    write_samples(place.folder / CALIBRATION, {name: train[chosen]})
    write_samples(place.folder / EVALUATION, {name: test}, test_labels)
    description = f"DS-CNN on spoken digits; 128 takes calibrate, {len(test)} others evaluate"
    return About(description, "classification", files, notes=notes)


def _features(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, 1, frames, bands) and digits, of training and of test takes."""
    parts: dict[bool, list[tuple[np.ndarray, int]]] = {False: [], True: []}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".wav"):
                digit, _, take = Path(name).stem.split("_")
                parts[int(take) < TEST_TAKES].append((_log_mel(archive.read(name)), int(digit)))
    found = [
        (np.stack([features for features, _ in part])[:, None], np.array([digit for _, digit in part]))
        for part in (parts[False], parts[True])
    ]
    mean, spread = found[0][0].mean(), found[0][0].std()
    (train, labels), (test, test_labels) = found
    return (train - mean) / spread, labels, (test - mean) / spread, test_labels


def _log_mel(data: bytes) -> np.ndarray:
    """One second of log-mel energies, (frames, bands) float32; shorter takes are padded with silence."""
    with wave.open(io.BytesIO(data)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    length = (FRAMES - 1) * HOP + WINDOW
    sound = np.pad(sound[:length], (0, max(length - len(sound), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    return np.log(power @ _filters() + 1e-6).astype(np.float32)


def _filters() -> np.ndarray:
    """Triangles, evenly spaced in mel = 2595 log10(1 + f / 700), (bins, bands)."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def _train(inputs: np.ndarray, labels: np.ndarray) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    blocks: list[Any] = [nn.Conv2d(1, 64, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for _ in range(4):
        blocks += [nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        blocks += [nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            moved = torch.roll(x[chosen], int(torch.randint(-4, 5, ())), 2)
            loss = nn.functional.cross_entropy(net(moved), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()
