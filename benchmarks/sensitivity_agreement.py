"""Does the fast ranking of units agree with the exhaustive one, and what does each cost?

    python train_qat.py +experiment=bccd weights=W.pt data.root=DATA stages=[float,calibrate] run_dir=runs/ranked
    python benchmarks/sensitivity_agreement.py runs/ranked [--images 87] [--json out.json]

`fisher` needs one backward pass over a few batches; `map` evaluates the detector twice per unit: with the unit alone
quantized, and with it alone left float. Prints the seconds of both next to those of one validation pass, and
Spearman's rank correlation of fisher with the sweep's score and with its two halves. Score and halves are
magnitudes: how far AP moves. The signed figures are given, too; signs on which two halves disagree are chance. The
sweep's results stay in the run directory, so that the script can be stopped, repeated, and run by several processes at
once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.compose import read
from core.rows import PTQ
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.stages.sensitivity import measure_units, rank_by_fisher, score_map
from quant import placement_of

NO_RUN = "sensitivity_agreement: skipped, no run directory given (see the docstring)"


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation in -1..1: Pearson's correlation of the ranks; ties share the mean of their ranks."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rank of each value from 0, the mean rank for equal values."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[where]


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory with the stage calibrate done")
    parser.add_argument("--images", type=int, help="validation images of the sweep; all when left out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.run is None:
        print(NO_RUN)
        return 0
    run = Run.open(Path(options.run))
    config = read(run.path(CONFIG))
    config.sensitivity.method = "map"
    job = Job(config, run)
    config.sensitivity.images = options.images or len(job.splits.val)
    model = job.networks.load(PTQ)
    units = [group.name for group in placement_of(model).groups]

    started = time.perf_counter()
    value_of(job.evaluator.measure(job.predictor(model), "one validation pass"))
    validation = time.perf_counter() - started
    config.sensitivity.images, images = 64, config.sensitivity.images
    started = time.perf_counter()
    fisher = {score.unit: score.score for score in rank_by_fisher(job, model)}
    fisher_seconds = time.perf_counter() - started
    config.sensitivity.images = images

    ap = measure_units(job, model)
    scored = score_map(ap, units)
    alone = np.array([score.parts["lost_when_quantized_alone"] for score in scored])
    left_out = np.array([score.parts["gained_when_left_float"] for score in scored])
    scores = [fisher[unit] for unit in units]
    result = {
        "units": len(units),
        "images": images,
        "seconds_of_a_validation_pass": validation,
        "seconds_of_fisher": fisher_seconds,
        "ap_float": ap["none"],
        "ap_quantized": ap["all"],
        "spearman_with_map": spearman(scores, [score.score for score in scored]),
        "spearman_with_unit_alone_quantized": spearman(scores, abs(alone)),
        "spearman_with_unit_left_float": spearman(scores, abs(left_out)),
        "spearman_between_the_halves": spearman(abs(alone), abs(left_out)),
        "spearman_between_the_halves_signed": spearman(alone, left_out),
        "spearman_with_signed_mean": spearman(scores, alone + left_out),
        "largest_loss_of_a_unit_alone": float(alone.max()),
    }
    for name, value in result.items():
        print(f"{name:40s} {value:.4f}" if isinstance(value, float) else f"{name:40s} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
