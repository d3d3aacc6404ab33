# SPDX-License-Identifier: Apache-2.0
"""Layers of the networks whose latencies are published: a published row gives a name and a resolution, no file.

Only what a latency is estimated from is kept of a layer: its kind, multiply-accumulates and elements. Activations that
runtimes fuse into their layer (ReLU, ReLU6) are none of their own; hard-swish, swish, additions and gates are.

Sources: the papers' tables (MobileNetV1 arXiv 1704.04861, V2 1801.04381, V3 1905.02244, MnasNet 1807.11626, EfficientNet
1905.11946 and its Lite form, ResNet 1512.03385, VGG 1409.1556) and MLPerf Tiny's autoencoder (2106.07597). What comes out
is checked against the multiply-accumulates that are published beside each latency (tests/edgeopt_profiles/test_latency.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil

from edgeopt_profiles.latency.work import Work, convolution, elementwise, product

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
V2 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)  # fmt: skip
MNAS = (
    (1, 16, 1, 1, 3), (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENT = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
"""Inverted residuals: (expansion, channels, repeats, stride of the first, kernel)."""

LITE = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
"""EfficientNet-Lite: (width, depth)."""

V3_LARGE = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)  # fmt: skip
V3_SMALL = (
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
)  # fmt: skip
"""MobileNetV3: (kernel, expanded, channels, squeeze-and-excite, hard-swish, stride)."""

RESNETS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def layers(model: str, side: int) -> tuple[Work, ...]:
    """The layers of a published model for square photos of `side` pixels; empty where it is not known here."""
    for pattern, make in _KNOWN.items():
        found = re.fullmatch(pattern, model)
        if found is not None:
            return tuple(make(found, side))
    return ()


def family(model: str) -> str:
    """What a model is a width or a depth of: mobilenet_v2_0.35 is a mobilenet_v2."""
    return re.sub(r"(_\d\.\d+|_v1\.5|lite\d|_minimalistic_1\.0)$", "", model)


class _Photo:
    """What flows: channels and side; each step gives the work that it takes."""

    def __init__(self, side: int) -> None:
        self.channels, self.side = 3, side

    def conv(self, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> Work:
        before = (self.channels, self.side)
        self.channels, self.side = channels, ceil(self.side / stride)
        return convolution(before, (self.channels, self.side), kernel, groups)

    def depthwise(self, kernel: int, stride: int = 1) -> Work:
        return self.conv(self.channels, kernel, stride, self.channels)

    @property
    def elements(self) -> int:
        return self.channels * self.side**2

    def swish(self) -> Work:
        return elementwise(2 * self.elements)

    def add(self) -> Work:
        return elementwise(3 * self.elements)

    def gate(self, squeezed: int) -> Iterator[Work]:
        """Squeeze-and-excite: pool, two small products, a multiplication."""
        yield elementwise(self.elements)
        yield product(self.channels, squeezed)
        yield product(squeezed, self.channels)
        yield elementwise(2 * self.elements)

    def head(self, *widths: int) -> Iterator[Work]:
        """Pool, then fully connected layers."""
        yield elementwise(self.elements)
        before = self.channels
        for width in widths:
            yield product(before, width)
            before = width


def _round(channels: float) -> int:
    """Channels are multiples of 8, and never lose more than a tenth (MobileNetV2's rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _mobilenet_v1(found: re.Match[str], side: int) -> Iterator[Work]:
    width, photo = float(found[1]), _Photo(side)
    yield photo.conv(int(32 * width), 3, 2)
    for channels, stride in V1:
        yield photo.depthwise(3, stride)
        yield photo.conv(int(channels * width), 1)
    yield from photo.head(1000)


def _residuals(
    photo: _Photo, blocks: Sequence[tuple[int, int, int, int, int]], *, is_swish: bool = False
) -> Iterator[Work]:
    """Inverted residuals; with swish also gates, as EfficientNet-B has them and its Lite form has not."""
    for expansion, channels, repeats, first, kernel in blocks:
        for number in range(repeats):
            before, stride = photo.channels, first if number == 0 else 1
            if expansion > 1:
                yield photo.conv(before * expansion, 1)
                if is_swish:
                    yield photo.swish()
            yield photo.depthwise(kernel, stride)
            if is_swish:
                yield photo.swish()
                yield from photo.gate(max(1, before // 4))
            yield photo.conv(channels, 1)
            if stride == 1 and before == channels:
                yield photo.add()


def _mobilenet_v2(found: re.Match[str], side: int) -> Iterator[Work]:
    width, photo = float(found[1]), _Photo(side)
    yield photo.conv(_round(32 * width), 3, 2)
    blocks = [(t, _round(c * width), n, s, k) for t, c, n, s, k in V2]
    yield from _residuals(photo, blocks)
    yield photo.conv(_round(1280 * max(1.0, width)), 1)
    yield from photo.head(1000)


def _mnasnet(_: re.Match[str], side: int) -> Iterator[Work]:
    photo = _Photo(side)
    yield photo.conv(32, 3, 2)
    yield from _residuals(photo, MNAS)
    yield photo.conv(1280, 1)
    yield from photo.head(1000)


def _efficientnet_lite(found: re.Match[str], side: int) -> Iterator[Work]:
    width, depth = LITE[int(found[1])]
    photo = _Photo(side)
    yield photo.conv(32, 3, 2)
    last = len(EFFICIENT) - 1
    blocks = [
        (t, _round(c * width), n if number in (0, last) else ceil(n * depth), s, k)
        for number, (t, c, n, s, k) in enumerate(EFFICIENT)
    ]
    yield from _residuals(photo, blocks)
    yield photo.conv(1280, 1)
    yield from photo.head(1000)


def _efficientnet_b0(_: re.Match[str], side: int) -> Iterator[Work]:
    photo = _Photo(side)
    yield photo.conv(32, 3, 2)
    yield photo.swish()
    yield from _residuals(photo, EFFICIENT, is_swish=True)
    yield photo.conv(1280, 1)
    yield photo.swish()
    yield from photo.head(1000)


def _mobilenet_v3(found: re.Match[str], side: int) -> Iterator[Work]:
    is_large, is_plain = found[1] == "large", bool(found[2])
    photo = _Photo(side)
    yield photo.conv(16, 3, 2)
    for entry in V3_LARGE if is_large else V3_SMALL:
        yield from _v3_block(photo, entry, is_plain=is_plain)
    yield photo.conv(6 * photo.channels, 1)
    if not is_plain:
        yield photo.swish()
    yield from photo.head(1280 if is_large else 1024, 1000)


def _v3_block(photo: _Photo, entry: tuple[int, ...], *, is_plain: bool) -> Iterator[Work]:
    kernel, expanded, channels, has_gate, has_swish, stride = entry
    before, swishes = photo.channels, bool(has_swish) and not is_plain
    if expanded != before:
        yield photo.conv(expanded, 1)
        if swishes:
            yield photo.swish()
    yield photo.depthwise(3 if is_plain else kernel, stride)
    if swishes:
        yield photo.swish()
    if has_gate and not is_plain:
        yield from photo.gate(_round(expanded / 4))
    yield photo.conv(channels, 1)
    if stride == 1 and before == channels:
        yield photo.add()


def _resnet(found: re.Match[str], side: int) -> Iterator[Work]:
    """ResNet, in whose v1.5 a stage's stride is in the 3x3 convolution and not in the first 1x1."""
    depth, is_later = int(found[1]), bool(found[2])
    photo = _Photo(side)
    yield photo.conv(64, 7, 2)
    photo.side = ceil(photo.side / 2)
    yield elementwise(5 * photo.elements)
    for stage, blocks in enumerate(RESNETS[depth]):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            yield from _resnet_block(photo, 64 << stage, stride, depth=depth, is_later=is_later)
    yield from photo.head(1000)


def _resnet_block(photo: _Photo, width: int, stride: int, *, depth: int, is_later: bool) -> Iterator[Work]:
    before, is_deep = (photo.channels, photo.side), depth >= 50
    channels = 4 * width if is_deep else width
    if is_deep:
        yield photo.conv(width, 1, 1 if is_later else stride)
        yield photo.conv(width, 3, stride if is_later else 1)
        yield photo.conv(channels, 1)
    else:
        yield photo.conv(width, 3, stride)
        yield photo.conv(width, 3)
    if before[0] != channels:
        yield convolution(before, (channels, photo.side), 1, 1)
    yield photo.add()


def _vgg16(_: re.Match[str], side: int) -> Iterator[Work]:
    photo = _Photo(side)
    for channels in VGG16:
        if channels:
            yield photo.conv(channels, 3)
        else:
            yield elementwise(photo.elements * 5 // 4)
            photo.side //= 2
    before = photo.elements
    for width in (4096, 4096, 1000):
        yield product(before, width)
        before = width


def _autoencoder(_: re.Match[str], __: int) -> Iterator[Work]:
    widths = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640)
    for before, after in pairwise(widths):
        yield product(before, after)


_KNOWN: dict[str, Callable[[re.Match[str], int], Iterator[Work]]] = {
    r"mobilenet_v1_([\d.]+)": _mobilenet_v1,
    r"mobilenet_v2_([\d.]+)": _mobilenet_v2,
    r"mobilenet_v3_(large|small)(_minimalistic)?_1\.0": _mobilenet_v3,
    r"mnasnet_1\.0": _mnasnet,
    r"efficientnet_lite(\d)": _efficientnet_lite,
    r"efficientnet_b0": _efficientnet_b0,
    r"resnet(18|50)(_v1\.5)?": _resnet,
    r"vgg16": _vgg16,
    r"mlperf_tiny_ad_autoencoder": _autoencoder,
}
