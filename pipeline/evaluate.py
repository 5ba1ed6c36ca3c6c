"""Measure any engine, run or checkpoint on a dataset, with the suppression and the metric of a report's rows.

    python -m pipeline.evaluate MODEL [--data FOLDER] [--compare float|MODEL] [--size SIZE] [--limit N] [--json FILE]

MODEL is what `python -m pipeline.predict` takes. Dataset, thresholds and metric are those of the run that MODEL lies
in, outside a run the defaults of `data` and `evaluate` (docs/configuration.md). `--compare` says how many detections of
the run's float model, or of another model, are found again. The last line of stdout is the AP, or the value of the
run's own metric. Exit code 2: wrong arguments. 3: a model or data that cannot be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.choices import CLASS_MAPS, DANGLING_LINKS, TORCH
from core.command import command_parser, path_argument, reports_errors, run_command, size_argument
from core.confinement import TRUST_HELP, run_confined
from core.errors import DeployError
from core.files import write_json
from core.runtimes import RUNTIMES

EXAMPLES = (
    "%(prog)s runs/bccd/latest --compare float",
    "%(prog)s model.onnx --data datasets/bccd --json figures.json",
)


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m pipeline.evaluate") -> int:
    """Run the command; returns the exit code."""
    options = _parser(program).parse_args(arguments)
    if not options.model.exists():  # found before torch is imported, which takes seconds
        raise DeployError(
            f"No model at {options.model}: expected a run directory, an engine or a checkpoint."
        )
    from pipeline.evaluation.measuring import row_figures, value_of
    from pipeline.prediction.figures import measure_model
    from pipeline.run.progress import say, show_package_logs

    show_package_logs()
    label, measured = measure_model(options)
    say(f"{label}: {measured.describe()}")
    if options.json is not None:
        point = measured.operating_point
        content = {"model": str(options.model), **row_figures(measured.metrics)}
        write_json(options.json, content | ({} if point is None else {"operating_point": point.as_dict()}))
    print(f"{value_of(measured.metrics):.4f}")
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, "Measure a model on a dataset.", EXAMPLES)
    parser.add_argument(
        "model", type=path_argument, help="run directory, engine, .onnx file, or float checkpoint"
    )
    parser.add_argument("--data", type=path_argument, help="dataset: YOLO data.yaml tree or COCO JSON folder")
    parser.add_argument(
        "--size", type=size_argument, help="of the input: PIXELS or HEIGHTxWIDTH; default: the model's"
    )
    parser.add_argument("--class-map", choices=CLASS_MAPS, help="default: the run's data.class_map, or names")
    parser.add_argument(
        "--dangling-links", choices=DANGLING_LINKS, help="default: the run's data.dangling_links, or error"
    )
    parser.add_argument(
        "--compare", metavar="float|MODEL", help="how many detections of this model are found again"
    )
    parser.add_argument("--split", help="default: the run's data.val_split, or val")
    parser.add_argument("--limit", type=int, help="images to use; default: all")
    parser.add_argument("--runtime", choices=(TORCH, *RUNTIMES), help="default: the run's, or the file's own")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


if __name__ == "__main__":
    run_command(lambda: run_confined(main))
