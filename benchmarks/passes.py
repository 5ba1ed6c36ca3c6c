"""Times calibration and sensitivity in passes: each as a ratio to float inference on the same images.

    python benchmarks/passes.py [--weights W] [--images FOLDER] [--size 320] [--num-images 16] [--rounds 5]
        [--without-map] [--detections] [--json FILE]

All works run in one process, one after the other in each round, and a ratio is taken within a round: the median over
the rounds, with the smallest and largest. Time is processor time of the process, so that other work on the machine
counts little. The unit is one pass of the float network in contiguous layout, batches of 8.

- `validation pass`: the quantized network, decode and suppression.
- `counting`: float inference that fills the histograms of all activations.
- `fisher`: forward, loss and backward of every image, with the scores; two made-up objects per image. Products of
  gradients are those of float32 values, and `in bfloat16` those of values rounded to that type. Printed is how far the
  two differ.
- `backward`: the same without scores, as a bound: gradients for the image, none for weights.
- `map, ...`: the network alone, mean over every second unit and over both items of a unit, of the first batch: as whole
  passes, and in groups that share what lies before their units. The unit is one float pass over that batch. With
  `--detections` decode and suppression are part of both.

Choosing scales and preparing the groups happens once for any number of images: it is printed in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training_step import compared, detector_of
from core.choices import OBSERVERS
from models import Detector, detector_loss, non_max_suppression
from quant import (
    Mode,
    SwitchedUnits,
    UnitScore,
    calibrate,
    insert,
    measure_fisher,
    place,
    placement_of,
    set_mode,
)
from quant.calibration.calibrate import apply_histograms, calibrate_weights, collect_histograms
from quant.sensitivity.fisher import image_of

PRODUCTS = {"": torch.float32, " in bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
BATCH, FISHER_BATCH = 8, 16
FLOAT = "float pass"
Work = Callable[[], object]


def read_images(folder: Path | None, count: int, size: int) -> Tensor:
    """Pictures of a folder, stretched to a square, or noise; float [count, 3, size, size]."""
    if folder is None:
        return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in files[:count]]  # type: ignore[arg-type]
    stretched = [torch.from_numpy(cv2.resize(picture, (size, size))) for picture in pictures]
    return torch.stack(stretched).permute(0, 3, 1, 2).float().div(255).contiguous()


def one_target(size: int) -> Tensor:
    """Two objects of one image, as the loss takes them."""
    boxes = torch.tensor([[40.0, 40.0, 140.0, 120.0], [100.0, 150.0, 200.0, 260.0]]) * size / 320
    return torch.cat([torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), boxes], 1)


class Works:
    """What is timed, by name; the float pass is the first, and each work says what it is divided by."""

    def __init__(self, detector: Detector, images: Tensor, detections: bool = False) -> None:
        self.detector = detector
        self.detections = detections
        self.network = detector.network.eval()
        self.images = images
        self.model: fx.GraphModule = insert(self.network, place(self.network)).eval()
        calibrate(self.model, images.split(BATCH))
        self.loss = detector_loss(detector)

    def all(self, sweeps: bool = True) -> dict[str, tuple[Work, float]]:
        """Name to the work, and how many passes over the images its time is divided by; those of `map` if wanted."""
        found: dict[str, tuple[Work, float]] = {}
        for name, layout in LAYOUTS.items():
            batches = self._laid_out(BATCH, layout)
            found[f"{FLOAT}, {name}"] = partial(self._inference, batches), 1
            found[f"validation pass, {name}"] = partial(self._validation, batches), 1
            found[f"counting, {name}"] = partial(collect_histograms, self.model, batches), 1
            small = self._laid_out(FISHER_BATCH, layout)
            found[f"backward, {name}"] = partial(self._backward, small), 1
            for precision, products in PRODUCTS.items():
                found[f"fisher{precision}, {name}"] = partial(self._fisher, small, products), 1
        return found | self._sweeps() if sweeps else found

    def _laid_out(self, size: int, layout: torch.memory_format) -> list[Tensor]:
        return [batch.contiguous(memory_format=layout) for batch in self.images.split(size)]

    @torch.inference_mode()
    def _inference(self, batches: list[Tensor]) -> None:
        for batch in batches:
            self.network(batch)

    @torch.inference_mode()
    def _validation(self, batches: list[Tensor]) -> None:
        set_mode(self.model, Mode.QUANTIZE)
        for batch in batches:
            self._detect(self.model(batch))

    def _detect(self, outputs: Any) -> None:
        non_max_suppression(self.detector.decode(outputs), 0.001, 0.7, 300)

    def _fisher(self, batches: list[Tensor], products: torch.dtype) -> list[UnitScore]:
        target = one_target(self.images.shape[-1])
        labelled = [(batch, [target] * len(batch)) for batch in batches]
        return measure_fisher(self.model, labelled, self.loss, products=products)

    def agreement(self) -> str:
        """How far products in bfloat16 move the scores of `fisher`, and the ranks of those above 0."""
        batches = self._laid_out(FISHER_BATCH, torch.channels_last)
        exact, rounded = (
            {score.unit: score.score for score in self._fisher(batches, products) if score.score > 0}
            for products in PRODUCTS.values()
        )
        changes = torch.tensor([abs(rounded[unit] / score - 1) for unit, score in exact.items()])
        ranks = {unit: rank for rank, unit in enumerate(rounded)}
        moves = torch.tensor([float(ranks[unit] - rank) for rank, unit in enumerate(exact)])
        count = len(exact)
        spearman = 1 - 6 * float(moves.square().sum()) / (count * (count**2 - 1))
        return (
            f"{count} units: scores move by {changes.max():.2%} at most, {changes.median():.2%} in the median; "
            f"ranks by {int(moves.abs().max())} at most, Spearman {spearman:.6f}"
        )

    def _backward(self, batches: list[Tensor]) -> None:
        target, (height, width) = one_target(self.images.shape[-1]), self.images.shape[-2:]
        for batch in batches:
            images = batch.detach().requires_grad_()
            outputs = self.network(images)
            terms = [
                term
                for index in range(len(images))
                for term in self.loss(image_of(outputs, index), target, (height, width)).values()
            ]
            torch.autograd.grad(torch.stack(terms).sum(), images)

    def _sweeps(self) -> dict[str, tuple[Work, float]]:
        units = [group.name for group in placement_of(self.model).groups][::2]
        batch = self._laid_out(BATCH, torch.channels_last)[0]
        share = len(batch) / len(self.images)
        switched = [SwitchedUnits(self.model, quantized, batch) for quantized in (False, True)]
        return {
            "map, whole passes": (partial(self._whole, batch), 2 * share),
            "map, in groups": (partial(self._grouped, switched, units, batch), 2 * len(units) * share),
        }

    @torch.inference_mode()
    def _whole(self, batch: Tensor) -> None:
        for mode in (Mode.OFF, Mode.QUANTIZE):
            set_mode(self.model, mode)
            outputs = self.model(batch)
            if self.detections:
                self._detect(outputs)

    @torch.inference_mode()
    def _grouped(self, switched: list[Any], units: list[str], batch: Tensor) -> None:
        for state in switched:
            for group in state.groups(units):
                for outputs in state.outputs(group, batch):
                    if self.detections:
                        self._detect(outputs)


def measure(works: Works, rounds: int, sweeps: bool = True) -> dict[str, dict[str, float]]:
    """Median, least and largest ratio of every work, and the median of its seconds."""
    named = works.all(sweeps)
    taken: dict[str, list[float]] = {name: [] for name in named}
    for number in range(rounds + 1):
        for name, (work, passes) in named.items():
            start = time.process_time()
            work()
            if number > 0:
                taken[name].append((time.process_time() - start) / passes)
    unit = taken[f"{FLOAT}, contiguous"]
    return {name: compared(seconds, unit) for name, seconds in taken.items()}


def choosing(works: Works) -> dict[str, float]:
    """Seconds of choosing the scales from the histograms, by method, those of the weights, and of preparing `map`."""
    histograms, num_images = collect_histograms(works.model, works.images.split(BATCH))
    found = {}
    for method in OBSERVERS:
        start = time.process_time()
        apply_histograms(works.model, histograms, method, 99.99, num_images)
        found[method] = time.process_time() - start
    start = time.process_time()
    calibrate_weights(works.model)
    found["weights"] = time.process_time() - start
    start = time.process_time()
    for quantized in (False, True):
        SwitchedUnits(works.model, quantized, works.images[:BATCH])
    return found | {"groups of map": time.process_time() - start}


def main() -> None:
    """Print one line per work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="checkpoint; default: YOLOv9-t with random weights")
    parser.add_argument("--images", type=Path, help="folder of pictures; default: noise")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-map", action="store_true", help="leave out `map`, most of the time")
    parser.add_argument("--detections", action="store_true", help="decode and suppression in `map`, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = read_images(options.images, options.num_images, options.size)
    works = Works(detector_of(options.weights), images, options.detections)
    table = measure(works, options.rounds, not options.without_map)
    for name, row in table.items():
        print(
            f"{name:<32} {row['seconds']:7.3f} s   {row['ratio']:.2f} ({row['least']:.2f} to {row['largest']:.2f})"
        )
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in choosing(works).items())
    print(f"fisher in bfloat16, {works.agreement()}")
    print(f"choosing the scales and preparing map, once: {seconds}")
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
