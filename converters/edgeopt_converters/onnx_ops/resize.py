# SPDX-License-Identifier: Apache-2.0
"""Resize and Upsample, in the forms that PyTorch computes with the same formula.

| ONNX mode and coordinates | PyTorch |
|---|---|
| nearest, asymmetric, floor | interpolate(mode="nearest") |
| nearest, half_pixel, round_prefer_ceil | interpolate(mode="nearest-exact") |
| nearest, half_pixel, rounding either way, at whole factors | interpolate(mode="nearest") |
| linear or cubic, half_pixel or pytorch_half_pixel | interpolate(mode="bilinear" or "bicubic") |
| linear or cubic, align_corners | the same with align_corners=True |

Why no general gather? It would run, and be many times slower than what each runtime has for these.
"""

from __future__ import annotations

from edgeopt_converters.onnx_ops import Call, Function, Tensor

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_WHOLE_FACTOR_ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil")


def _resize(call: Call) -> Tensor:
    from torch.nn import functional

    x = call.tensor(0)
    sizes, factors = _target(call, list(x.shape))
    if sizes[:2] != list(x.shape[:2]):
        raise call.refuse(f"it resizes {list(x.shape)} to {sizes}; only the axes after the second can change")
    mode, align = _mode(call, sizes, list(x.shape))
    spatial = sizes[2:]
    if factors is None:
        return functional.interpolate(x, size=spatial, mode=mode, align_corners=align)
    exact = [f * size == out for f, size, out in zip(factors[2:], x.shape[2:], spatial, strict=True)]
    if align and not all(exact):
        raise call.refuse("it aligns corners and its factors give no whole sizes; give its output size")
    if all(exact):
        return functional.interpolate(x, size=spatial, mode=mode, align_corners=align)
    return functional.interpolate(
        x, scale_factor=factors[2:], mode=mode, align_corners=align, recompute_scale_factor=False
    )


def _target(call: Call, shape: list[int]) -> tuple[list[int], list[float] | None]:
    """The output's sizes, and the factors if those are what the model gives."""
    axes = list(call.get("axes", range(len(shape))))
    given_sizes = call.integers(3)
    if given_sizes:
        if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise call.refuse("it keeps the aspect ratio; give its output size")
        sizes = list(shape)
        for axis, size in zip(axes, given_sizes, strict=True):
            sizes[axis] = size
        return sizes, None
    scales = call.constant(1 if call.type == "Upsample" else 2)
    if scales is None or not scales.size:
        raise call.refuse("it has neither sizes nor scales")
    factors = [1.0] * len(shape)
    for axis, factor in zip(axes, scales.reshape(-1), strict=True):
        factors[axis] = float(factor)
    return [int(size * factor) for size, factor in zip(shape, factors, strict=True)], factors


def _mode(call: Call, sizes: list[int], shape: list[int]) -> tuple[str, bool | None]:
    mode = call.get("mode", "nearest")
    coordinates = call.get(
        "coordinate_transformation_mode", "half_pixel" if call.type == "Resize" else "asymmetric"
    )
    rounding = call.get("nearest_mode", "round_prefer_floor" if call.type == "Resize" else "floor")
    if call.get("antialias", 0) or call.get("exclude_outside", 0):
        raise call.refuse("it smooths or cuts the border (antialias or exclude_outside)")
    if mode == "nearest":
        if coordinates == "asymmetric" and rounding == "floor":
            return "nearest", None
        is_whole = all(out % size == 0 for out, size in zip(sizes, shape, strict=True))
        if is_whole and (coordinates, rounding) in {
            ("asymmetric", "floor"),
            *(("half_pixel", how) for how in _WHOLE_FACTOR_ROUNDINGS),
        }:
            return "nearest", None
        if (coordinates, rounding) == ("half_pixel", "round_prefer_ceil"):
            return "nearest-exact", None
    interpolations = {"linear": _LINEAR.get(len(shape) - 2), "cubic": "bicubic" if len(shape) == 4 else None}
    found = interpolations.get(mode)
    if mode == "cubic" and call.get("cubic_coeff_a", -0.75) != -0.75:
        found = None
    is_half_pixel = coordinates == "half_pixel" or (
        coordinates == "pytorch_half_pixel" and min(sizes[2:]) > 1
    )
    if found and is_half_pixel:
        return found, False
    if found and coordinates == "align_corners":
        return found, True
    raise call.refuse(
        f"mode {mode!r} with {coordinates!r} and {rounding!r} on {len(shape)} axes has no equal in PyTorch"
    )


OPERATORS: dict[str, Function] = {"Resize": _resize, "Upsample": _resize}
