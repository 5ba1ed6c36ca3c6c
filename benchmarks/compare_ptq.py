r"""Accuracy after post-training quantization: Octet against NNCF and NVIDIA's modelopt, everything else equal.

    python benchmarks/compare_ptq.py +experiment=bccd weights=W.pt data.root=DATA \
        --nncf-python PYTHON --modelopt-python PYTHON [--folder FOLDER] [--json FILE]

The same float network, the same calibration images (those of `quant.calibration_images`, 300 at most), the same
validation images, letterbox, NMS and metric. Each peer runs with its defaults, and with the decode, and the last
convolutions too, left float, which a user has to ask for. How to make the peers' environments is described in
`peers/tools.py`; settings are those of train_qat.py. Peers that are not there are skipped.

Each model is evaluated as OpenVINO runs it (CPU, float part in FP32). Some processors and graphs give different
answers under OpenVINO than the graph says (see docs/deployment.md); such a file is also executed literally, node by
node, by ONNX Runtime without graph optimizations: this figure is the accuracy of the tool's scales.
A single AP on a hundred images moves by some thousandths with the roundings; --views N takes the mean over N slightly
moved views (benchmarks/views.py), with the standard error of its difference to float.
--engine adds a model that another tool made by itself, such as Ultralytics' own export (it chose its own images).
With --folder the models and their figures are kept, and reused by the next call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.tools import VARIANTS, Peer, add_peer_options, circumstances, find_peers, write_result
from benchmarks.views import ap_of_views, mean_difference
from configs import compose
from data import to_input
from deploy import ONNXRuntime, OpenVINORuntime, Runtime, compare_arrays
from pipeline.job import Job
from pipeline.main import run_job
from pipeline.run.directory import Run
from pipeline.stages.calibration import calibration_images
from pipeline.stages.engine import engine_predictor

MAX_CALIBRATION_IMAGES = 300
PARITY_IMAGES = 8
PARITY_MEAN_SCORE = 0.001  # sound engines stay below 0.0005


OURS: dict[str, tuple[str, ...]] = {
    "int8, signed codes": ("quant.activations.unsigned=false",),
    "int8, unsigned codes": ("quant.activations.unsigned=true",),
}
"""Octet's own variants: what every engine runs, and what CPU engines run (NNCF's models have unsigned codes, too)."""


@dataclass
class Row:
    """One tool and variant.

    Attributes:
        views_openvino: AP by OpenVINO on each view, the images as they are first.
        views_literal: the same by ONNX Runtime without optimizations; empty where OpenVINO does what the graph says.
        score_difference: mean difference of class scores between the two on a few images; None for OpenVINO's models.
    """

    tool: str
    variant: str
    views_openvino: list[float] = field(default_factory=list)
    views_literal: list[float] = field(default_factory=list)
    score_difference: float | None = None

    @property
    def views(self) -> list[float]:
        """The figures that count: literal ones where OpenVINO computes something else than the graph says."""
        return self.views_literal or self.views_openvino

    @property
    def mean(self) -> float:
        """Mean AP over the views that count."""
        return float(np.mean(self.views))


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_peer_options(parser)
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="TOOL=FILE",
        help="another tool's INT8 model with decoded outputs [1, 4 + classes, anchors], measured beside; repeatable",
    )
    parser.add_argument("--views", type=int, default=1, help="views of the validation images")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    peers = find_peers(options)
    if not overrides or not (peers or options.engine):
        print(
            "skipped: this comparison needs +experiment=... weights=... data.root=... and a peer or --engine"
        )
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        job = octet_job(overrides, folder / "run")
        models = {**ours(job, folder, overrides), **theirs(job, peers, folder), **engines_of(options.engine)}
        rows = [measured(job, *key, engine, folder, options.views) for key, engine in models.items()]
    print_table(rows)
    write_result(
        options.json,
        {
            "settings": overrides,
            **circumstances(peers),
            "margins": margins(rows),
            "rows": [asdict(row) for row in rows],
        },
    )
    return 0


def margins(rows: list[Row]) -> dict[str, float]:
    """How far each INT8 row of Octet lies above the best row of any peer, in mean AP."""
    best = max((row for row in rows if row.tool != "octet"), key=lambda row: row.mean)
    found = {}
    for row in rows:
        if row.tool == "octet" and row.variant in OURS:
            difference, error = mean_difference(row.views, best.views)
            found[row.variant] = difference
            print(f"octet {row.variant}: {difference:+.4f} ± {error:.4f} against {best.tool} {best.variant}")
    return found


def octet_job(overrides: list[str], directory: Path) -> Job:
    """Measure, calibrate and export by the pipeline; a directory that has it all already is only opened."""
    if not (directory / "model.onnx").exists():
        stages = [
            "run_dir=" + str(directory),
            "stages=[float,calibrate,export]",
            "deploy.dynamic_batch=false",
        ]
        run_job(compose([*overrides, *stages]))
    config = compose(overrides)
    config.deploy.batch = 1
    return Job(config, Run.open(directory))


def ours(job: Job, folder: Path, overrides: list[str]) -> dict[tuple[str, str], Path]:
    """(tool, variant) -> model file of Octet: the float network and the calibrated ones."""
    found = {("octet", "float"): job.run.path("float.onnx")}
    for variant, settings in OURS.items():
        name = "-".join(["run", *variant.replace(",", "").split()[1:]])
        found["octet", variant] = octet_job([*overrides, *settings], folder / name).run.path("model.onnx")
    return found


def theirs(job: Job, peers: dict[str, Peer], folder: Path) -> dict[tuple[str, str], Path]:
    """(tool, variant) -> model file of the peers."""
    images = images_for_peers(job)
    floating = job.run.path("float.onnx")
    found = {}
    for peer in peers.values():
        for variant, arguments in VARIANTS[peer.name].items():
            stem = folder / f"{peer.name}-{variant.replace(' ', '-')}"
            print(f"{peer.name}, {variant}: {len(images)} calibration images", flush=True)
            found[peer.name, variant] = peer.quantize(floating, images, stem.with_suffix(".onnx"), arguments)
            if peer.name == "nncf":  # its first backend, with a model of its own
                xml = peer.quantize(floating, images, stem.with_suffix(".xml"), arguments)
                found[peer.name, f"{variant}, OpenVINO's model"] = xml
    return found


def engines_of(given: list[str]) -> dict[tuple[str, str], Path]:
    """(tool, variant) -> model file for each TOOL=FILE of `--engine`.

    Raises:
        SystemExit: a file is not there.
    """
    found = {}
    for text in given:
        tool, _, name = text.partition("=")
        if not Path(name).is_file():
            raise SystemExit(f"--engine {text}: expected TOOL=FILE with a file that exists")
        found[tool, Path(name).stem] = Path(name)
    return found


def images_for_peers(job: Job) -> np.ndarray:
    """The images of Octet's own calibration, float32 [N, 3, H, W]."""
    images = torch.cat(list(calibration_images(job))).numpy()
    return images[:MAX_CALIBRATION_IMAGES]


def measured(job: Job, tool: str, variant: str, engine: Path, folder: Path, views: int) -> Row:
    """AP of a model on every view; figures that the folder has are not measured again."""
    row = Row(tool, variant)
    kept = folder / "figures" / f"{tool} {variant} {views}.json"
    if kept.exists():
        return Row(**json.loads(kept.read_text()))
    with OpenVINORuntime(engine, "f32", batch=1) as runtime:
        row.views_openvino = ap_of_views(job, engine_predictor(job, runtime), views)
        if engine.suffix == ".onnx":
            with ONNXRuntime(engine, optimize=False) as reference:
                row.score_difference = score_difference(job, runtime, reference)
                if row.score_difference > PARITY_MEAN_SCORE:
                    row.views_literal = ap_of_views(job, engine_predictor(job, reference), views)
    print(f"{tool} {variant}: AP {row.views[0]:.4f}, mean {row.mean:.4f}", flush=True)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(asdict(row)) + "\n")
    return row


def score_difference(job: Job, runtime: Runtime, reference: Runtime) -> float:
    """Mean difference of class scores between two engines of one graph."""
    batches = job.splits.letterboxed(job.splits.val, 1, PARITY_IMAGES)
    images = [to_input(batch.images, torch.device("cpu")).numpy() for batch in batches]
    outputs = [np.concatenate([r.infer(image) for image in images]) for r in (runtime, reference)]
    return compare_arrays(outputs[0], outputs[1]).score_mean


def print_table(rows: list[Row]) -> None:
    """The table as Markdown."""
    floating = rows[0].views
    print("\n| tool | variant | AP | mean AP | to float | executed |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        difference, error = mean_difference(row.views, floating)
        executed = (
            "literally; OpenVINO gives " + f"{np.mean(row.views_openvino):.4f}"
            if row.views_literal
            else "OpenVINO"
        )
        print(
            f"| {row.tool} | {row.variant} | {row.views[0]:.4f} | {row.mean:.4f} | {difference:+.4f} ± {error:.4f} | "
            f"{executed} |"
        )


if __name__ == "__main__":
    sys.exit(main())
