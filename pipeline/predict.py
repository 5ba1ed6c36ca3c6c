"""Try any engine on your own pictures: boxes, and masks where there are any, are drawn and written as COCO JSON.

    python -m pipeline.predict MODEL_OR_RUN IMAGE|FOLDER|VIDEO [--runtime NAME] [--compare float|MODEL] [--out DIR]

MODEL_OR_RUN is a run directory (its quantized engine, in torch where this machine cannot run it), an .onnx, .xml,
.engine or .plan file, or a float checkpoint. OUT holds the pictures (PNG, or one MP4 for a video) and detections.json.
Exit code 2: wrong arguments. 3: a model or picture that cannot be used.

Only what reads the command line is imported at once: `--help` and wrong arguments need neither torch nor OpenCV.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.choices import TORCH
from core.command import command_parser, path_argument, reports_errors, run_command, size_argument
from core.confinement import TRUST_HELP, run_confined
from core.errors import DataError, DeployError
from core.image_size import ImageSize
from core.runtimes import RUNTIMES

if TYPE_CHECKING:
    from pipeline.prediction.predictors import Predictor

EXAMPLES = (
    "%(prog)s runs/bccd/latest photo.jpg --compare float",
    "%(prog)s model.onnx pictures --confidence 0.4 --out found",
)


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m pipeline.predict") -> int:
    """Run the command; returns the exit code."""
    options = _parser(program).parse_args(arguments)
    _check_paths(options)
    import torch

    from pipeline.prediction.drawing import predict
    from pipeline.prediction.predictors import Options, open_other, open_predictor
    from pipeline.prediction.sources import open_source

    opened: list[Predictor] = []
    try:
        source = open_source(options.source)
        if options.threads:
            torch.set_num_threads(options.threads)
        wanted = Options(
            confidence=options.confidence,
            iou=options.iou,
            runtime=options.runtime,
            trust=options.trust,
            size=options.size,
            threads=options.threads,
            device=options.device,
        )
        opened.append(open_predictor(options.model, wanted))
        if options.compare is not None:
            opened.append(open_other(options.model, options.compare, wanted))
        predict(opened[0], source, options.out, opened[1] if len(opened) > 1 else None, options.confidence)
    finally:
        for predictor in opened:
            predictor.close()
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    """Refuse what is not there before torch is imported, which takes seconds."""
    if not options.source.exists():
        raise DataError(f"Nothing at {options.source}: expected an image, a folder of images or a video.")
    if not options.model.exists():
        raise DeployError(
            f"No model at {options.model}: expected a run directory, an engine or a checkpoint."
        )


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, "Run a model on images or videos and draw the detections.", EXAMPLES)
    parser.add_argument(
        "model", type=path_argument, help="run directory, .onnx, .xml, .engine, or a float checkpoint"
    )
    parser.add_argument("source", type=path_argument, help="image, folder of images, or video")
    parser.add_argument(
        "--runtime", choices=(TORCH, *RUNTIMES), help="default: the run's, or what the file was made for"
    )
    parser.add_argument(
        "--compare", metavar="float|MODEL", help="draw a second model next to it, count matching boxes"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for results")
    parser.add_argument("--confidence", type=_share, default=0.25, help="lowest score drawn")
    parser.add_argument("--iou", type=_share, default=0.7, help="NMS threshold")
    parser.add_argument(
        "--size", type=_size, help="of the input, if the model leaves it open: PIXELS or HEIGHTxWIDTH"
    )
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    parser.add_argument("--threads", type=_positive, help="CPU threads")
    parser.add_argument("--device", default="auto", help="device of torch: auto, cpu, cuda")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _size(text: str) -> ImageSize:
    size = size_argument(text)
    if any(side % 32 for side in size):
        raise argparse.ArgumentTypeError(f"'{text}' is not a multiple of 32")
    return size


if __name__ == "__main__":
    run_command(lambda: run_confined(main))
