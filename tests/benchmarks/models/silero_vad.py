# SPDX-License-Identifier: Apache-2.0
"""silero-vad, a recurrent voice detector (from PyPI), on spoken digits between noise: 32 ms a frame, its state fed back.

Two files of one net: the package's default, which keeps its weights as Constant nodes inside branches, and one with
its weights at the top, which per-tensor int8 breaks. Evaluation is closed loop: every file hears a recording with the
state that it made itself, as on a device; calibration gets the float file's states.

Digits: the Free Spoken Digit Dataset (CC BY-SA 4.0). Labels are where a clip's own energy is, not a person's word.
"""

from __future__ import annotations

import io
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from environments import package

from models import CALIBRATION, EVALUATION, About, Place, write_onnx, write_recipe, write_runs

FILES = {"silero-vad": "silero_vad.onnx", "silero-vad-flat": "silero_vad_16k_op15.onnx"}
NAMES = tuple(FILES)
RATE, FRAME, CONTEXT = 16000, 512, 64
"""Hertz, new samples a frame, and samples of the frame before that the net wants to hear again."""
FRAMES, DIGITS = 140, 5
RECORDINGS = {CALIBRATION: 10, EVALUATION: 60}
CALIBRATING = 256
TEST_TAKES = 5
SNR_DB = 12.0
LOUD = 0.1
"""A frame is speech where its energy is above this share of the clip's mean."""
RECIPE = """precisions = ["int8-weights"]

[constants]
sr = 16000

[[inputs]]
name = "input"
shape = [1, 576]
dtype = "float32"

[[inputs]]
name = "state"
shape = [2, 1, 128]
dtype = "float32"

[passes.quantize_weights]
method = "rtn"
"""


def prepare(place: Place) -> About:
    clips = _clips(place.data("fsdd/fsdd-4-speakers.zip"))
    given = package("silero-vad==6.2.3", place.cache) / "silero_vad" / "data" / FILES[place.name]
    recipe = write_recipe(place, RECIPE)
    files, notes = write_onnx(place, given, recipe)
    frames, _ = _recordings(clips[False], RECORDINGS[CALIBRATION], seed=0)
    write_runs(place.folder / CALIBRATION, _as_heard(given, frames))
    frames, labels = _recordings(clips[True], RECORDINGS[EVALUATION], seed=1)
    count = len(frames)
    state = np.zeros((count, 2, 1, 128), np.float32)
    rate = np.full(count, RATE, np.int64)
    write_runs(place.folder / EVALUATION, {"input": frames[:, :, None], "state": state, "sr": rate}, labels)
    description = (
        f"{given.name}, spoken digits in noise at {SNR_DB:.0f} dB; {CALIBRATING} frames calibrate, {count} recordings "
        f"of {FRAMES} frames of other takes evaluate, in closed loop"
    )
    return About(
        description,
        "frames",
        files,
        metric="auc",
        recipe=recipe,
        loops={"state": 1},
        steps=("input",),
        notes=notes,
    )


def _clips(path: Path) -> dict[bool, list[np.ndarray]]:
    """Clips at 16 kHz, float32 of -1 to 1, of test takes and of others."""
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".wav"):
                take = int(Path(name).stem.split("_")[2])
                found[take < TEST_TAKES].append(_twice_the_rate(archive.read(name)))
    return found


def _twice_the_rate(data: bytes) -> np.ndarray:
    """From 8 to 16 kHz: the spectrum stays, the upper half is silent."""
    with wave.open(io.BytesIO(data)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    spectrum = np.fft.rfft(sound)
    return np.asarray(2 * np.fft.irfft(spectrum, 2 * len(sound)), np.float32)


def _recordings(clips: list[np.ndarray], count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames with their context, (count, FRAMES, CONTEXT + FRAME), and whether each is speech."""
    draw = np.random.default_rng(seed)
    frames, labels = [], []
    for _ in range(count):
        chosen = draw.permutation(len(clips))[:DIGITS]
        clean = np.zeros(FRAMES * FRAME, np.float32)
        at = int(draw.integers(RATE // 4, RATE))
        for number in chosen:
            clip = clips[number][: len(clean) - at]
            clean[at : at + len(clip)] = clip
            at = min(at + len(clip) + int(draw.integers(RATE // 8, RATE)), len(clean))
        power = clean.reshape(FRAMES, FRAME) ** 2
        heard = power.mean(1)
        loud = LOUD * heard[heard > 0].mean()
        noise = _coloured(len(clean), draw)
        level = np.sqrt(heard[heard > loud].mean() / 10 ** (SNR_DB / 10))
        sound = np.concatenate([np.zeros(CONTEXT, np.float32), clean + level * noise])
        windows = np.lib.stride_tricks.sliding_window_view(sound, CONTEXT + FRAME)[::FRAME]
        frames.append(windows[:FRAMES].astype(np.float32))
        labels.append(heard > loud)
    return np.stack(frames), np.stack(labels)


def _coloured(length: int, draw: np.random.Generator) -> np.ndarray:
    """Noise of power 1 that falls with frequency, as rooms and streets have it."""
    spectrum = np.fft.rfft(draw.normal(size=length))
    shaped = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 20), length)
    return np.asarray(shaped / shaped.std(), np.float32)


def _as_heard(file: Path, frames: np.ndarray) -> dict[str, Any]:
    """Every input of the float file, frame by frame; frames are drawn among all recordings."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rate = np.array(RATE, np.int64)
    inputs, states = [], []
    for recording in frames:
        state = np.zeros((2, 1, 128), np.float32)
        for frame in recording:
            inputs.append(frame[None])
            states.append(state)
            _, state = session.run(None, {"input": frame[None], "state": state, "sr": rate})
    chosen = np.random.default_rng(0).permutation(len(inputs))[:CALIBRATING]
    return {
        "input": np.stack([inputs[number] for number in chosen]),
        "state": np.stack([states[number] for number in chosen]),
        "sr": np.full(len(chosen), RATE, np.int64),
    }
