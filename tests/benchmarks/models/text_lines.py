# SPDX-License-Identifier: Apache-2.0
"""PP-OCRv6's small text recognizer (from PyPI's rapidocr), on lines of text drawn with the DejaVu fonts.

The text is known exactly. Lines that calibrate are of other documents than those that evaluate. The published file is
of opset 11 with free axes: it is brought to static shapes and a current opset first, or some peers would refuse it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from environments import package
from paragraphs import paragraphs

from models import CALIBRATION, EVALUATION, About, Place, write_onnx, write_recipe, write_samples

NAMES = ("ocr",)
HEIGHT, WIDTH, MARGIN = 48, 320, 6
COUNTS = {CALIBRATION: 96, EVALUATION: 150}
SUPERSAMPLE = 2
RECIPE = """[[inputs]]
name = "x"
shape = [1, 3, 48, 320]
dtype = "float32"
layout = "NCHW"
"""


def prepare(place: Place) -> About:
    import onnx

    from edgeopt.recipe import load_recipe
    from edgeopt.sources import load_source

    given = package("rapidocr==3.10.0", place.cache) / "rapidocr" / "models" / "PP-OCRv6_rec_small.onnx"
    recipe = write_recipe(place, RECIPE)
    floats = place.folder / "model.onnx"
    onnx.save(load_source(str(given), load_recipe(Path(recipe))).model.program, floats)
    files, notes = write_onnx(place, floats, recipe)
    symbols = _write_symbols(given, place.folder / "symbols.txt")
    for part, target in enumerate((CALIBRATION, EVALUATION)):
        lines = _lines(part, COUNTS[target])
        pictures, texts = zip(*map(_draw, lines, range(len(lines))), strict=True)
        labels = np.array(texts) if target == EVALUATION else None
        write_samples(place.folder / target, {"x": np.stack(pictures)}, labels)
    description = (
        f"PP-OCRv6 small recognizer; {COUNTS[CALIBRATION]} lines calibrate, {COUNTS[EVALUATION]} of other documents "
        "evaluate"
    )
    options = {"symbols_file": str(symbols)}
    return About(description, "speech", files, options, metric="cer", recipe=recipe, notes=notes)


def _write_symbols(model: Path, target: Path) -> Path:
    """One symbol a line, as the file's own metadata lists them; blank and space are understood."""
    import onnx

    found = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    target.write_text("\n".join((*found["character"].split("\n"), " ")), encoding="utf-8")
    return target


def _lines(part: int, count: int) -> list[str]:
    """Some words of each paragraph in turn, as many as fit."""
    draw = np.random.default_rng(part)
    found = []
    for paragraph in paragraphs(part, count):
        plain = paragraph.encode("ascii", "ignore").decode()
        words = plain.split()
        at = int(draw.integers(0, max(1, len(words) - 4)))
        line = words[at][:18]
        for word in words[at + 1 :]:
            if len(line) + 1 + len(word) > 24:
                break
            line += f" {word}"
        found.append(line)
    return found


def _draw(text: str, number: int) -> tuple[Any, str]:
    """A line of text as the recognizer is fed, (3, HEIGHT, WIDTH) of -1 to 1, and what of it fits into the picture."""
    from PIL import Image, ImageDraw, ImageFont

    draw = np.random.default_rng(number)
    size = int(draw.integers(24, 34)) * SUPERSAMPLE
    font = ImageFont.truetype(str(_fonts()[number % len(_fonts())]), size)
    room = (WIDTH - 2 * MARGIN) * SUPERSAMPLE
    while font.getlength(text) > room:
        text = text[:-1].rstrip()
    paper, ink = int(draw.integers(200, 256)), int(draw.integers(0, 90))
    picture = Image.new("L", (WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE), paper)
    middle = (MARGIN * SUPERSAMPLE, HEIGHT * SUPERSAMPLE // 2)
    ImageDraw.Draw(picture).text(middle, text, ink, font, anchor="lm")
    pixels = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float32)
    noisy = np.clip(pixels + draw.normal(0, 6, pixels.shape), 0, 255)
    return np.repeat((noisy / 127.5 - 1).astype(np.float32)[None], 3, 0), text


def _fonts() -> list[Path]:
    import matplotlib as mpl

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return sorted(path for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name)
