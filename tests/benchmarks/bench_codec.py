"""Brush codec against the SDK's: CPU seconds at 1024 x 1024, interleaved. Prints one JSON object.

    python tests/benchmarks/bench_codec.py [--rounds 5] [--quick]

Three masks: a ragged one (thresholded noise of 4 px grain, like a bad segmentation), discs, and an empty one. The
speed-up is the ratio of the summed medians, so it is ruled by the ragged mask, which is the slow one for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import numpy as np
from label_studio_sdk.converter import brush
from scipy.ndimage import gaussian_filter

from dagkit.labelstudio import codec

SIZE = 1024


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    discs = ((x - 300) ** 2 + (y - 400) ** 2 < 200**2) | ((x - 700) ** 2 + (y - 600) ** 2 < 150**2)
    ragged = gaussian_filter(rng.standard_normal((SIZE, SIZE)), 2) > 0.05
    return {"ragged": ragged, "discs": discs, "empty": np.zeros((SIZE, SIZE), bool)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="One round.")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name, function, *arguments):
        start = time.process_time()
        result = function(*arguments)
        seconds[name].append(time.process_time() - start)
        return result

    for _ in range(rounds):
        for name, mask in masks().items():
            grey = mask.astype(np.uint8) * 255
            ours = timed(f"encode.ours.{name}", codec.encode, mask)
            theirs = timed(f"encode.sdk.{name}", brush.mask2rle, grey)
            assert ours == theirs
            alpha = timed(f"decode.ours.{name}", codec.decode, ours, SIZE, SIZE)
            raster = timed(f"decode.sdk.{name}", brush.decode_rle, theirs)
            assert np.array_equal(alpha, raster.reshape(SIZE, SIZE, 4)[..., 3])

    medians = {name: statistics.median(values) for name, values in seconds.items()}

    def total(prefix: str) -> float:
        return sum(value for name, value in medians.items() if name.startswith(prefix))

    print(
        json.dumps(
            {
                "codec.encode_speedup": round(total("encode.sdk") / total("encode.ours"), 2),
                "codec.decode_speedup": round(total("decode.sdk") / total("decode.ours"), 2),
                "codec.cpu_ms": {name: round(value * 1000, 2) for name, value in sorted(medians.items())},
                "codec.num_rounds": rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
