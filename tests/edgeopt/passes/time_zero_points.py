# SPDX-License-Identifier: Apache-2.0
"""Times what zero point 0 gains in OpenVINO: `python time_zero_points.py` prints a row for each net and scheme.

`ONEDNN_MAX_CPU_ISA=AVX2 python time_zero_points.py` shows what a CPU without VNNI makes of it; the variable must be there
before the library is loaded.
"""

import numpy as np
from test_zero_points_openvino import attention, decoder, quantized, samples

from edgeopt.side_by_side import loaded, relative_time
from edgeopt_profiles.reader import shared_schemes

SCHEMES = ("u8s8", "u8s8-safe", "u8s8-zero", "tensorrt")
ROUNDS = 3


def main() -> None:
    nets = {"decoder": decoder(relu=False, width=64, size=64), "attention": attention(128, 256)}
    for name, source in nets.items():
        edges, rows = (source.inputs, source.outputs), samples(source.inputs[0].shape, seed=9)
        with loaded(source.program.SerializeToString(), "openvino", *edges) as floats:
            exact = np.stack([floats.run(row)["y"] for row in rows]).astype(np.float64)
            for scheme in SCHEMES:
                file = quantized(source, shared_schemes()[scheme]).model.program.SerializeToString()
                with loaded(file, "openvino", *edges) as integers:
                    found = np.stack([integers.run(row)["y"] for row in rows])
                    taken = min(relative_time(floats, integers, rows[0]) for _ in range(ROUNDS))
                sqnr_db = 10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum())
                print(f"{name:10} {scheme:10} {sqnr_db:5.1f} dB  {taken:.2f} of the float file's time")


if __name__ == "__main__":
    main()
