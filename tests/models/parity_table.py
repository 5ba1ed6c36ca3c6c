"""Differences of our networks to the recorded outputs of the official ones: run as a program, prints a Markdown table.

    PYTHONPATH=. python tests/models/parity_table.py FOLDER [NAME ...]

FOLDER holds `NAME.keys.json` and `NAME.expected.npz`. Everything is computed in float64; rows of `output` are boxes in
input pixels and scores.
"""

import sys
from pathlib import Path

import torch
from model_fixtures import fixture_images, fixture_output, fixture_state
from torch import Tensor

from models import Detector, fold_detector
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint


def differences(detector: Detector, images: Tensor, expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each recorded array."""
    with torch.no_grad():
        found = detector(images)
    parts = found if isinstance(found, tuple) else (found,)
    return {
        name: float((part - wanted).abs().max())
        for (name, wanted), part in zip(expected.items(), parts, strict=False)
    }


def main() -> None:
    folder = Path(sys.argv[1])
    names = sys.argv[2:] or sorted(path.name.split(".")[0] for path in folder.glob("*.keys.json"))
    images = fixture_images(folder).double()
    print("| fixture | network | array | as loaded | folded |\n| --- | --- | --- | ---: | ---: |")
    for name in names:
        state = fixture_state(folder, name)
        detector = detector_from_checkpoint(Checkpoint(state), name, activation="silu").double()
        if "one2many" in detector.heads:
            detector.deploy_head("one2many")
        arrays = ("output", "prototypes") if detector.task == "segment" else ("output",)
        expected = {array: fixture_output(folder, name, array) for array in arrays}
        loaded = differences(detector, images, expected)
        folded = differences(fold_detector(detector), images, expected)
        for array in arrays:
            print(
                f"| {name} | {detector.architecture} | {array} | {loaded[array]:.1e} | {folded[array]:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
