r"""Accuracy after post-training quantization: Octet against NNCF and NVIDIA's modelopt, everything else equal.

    python benchmarks/compare_ptq.py +experiment=bccd weights=W.pt data.root=DATA \
        --nncf-python PYTHON --modelopt-python PYTHON [--folder FOLDER] [--json FILE]

The same float network, the same calibration images (those of `quant.calibration_images`, 300 at most), the same
validation images, letterbox, NMS and metric. Each peer runs with its defaults, and with the decode, and the last
convolutions too, left float, which a user has to ask for. How to make the peers' environments stands in
`peers/tools.py`; settings are those of train_qat.py. Peers that are not there are skipped.

Each model is evaluated twice: as OpenVINO runs it (CPU, float part in FP32), and literally, node by node, by
ONNX Runtime without graph optimizations. Some processors and graphs give different answers under OpenVINO (see
docs/deployment.md); the literal figure is what the tool's scales are worth, and a peer is judged by its better one.
With --folder the models and their figures are kept, and reused by the next call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.tools import VARIANTS, Peer, add_peer_options, circumstances, find_peers, write_result
from configs import compose
from data import to_input
from deploy import ONNXRuntime, OpenVINORuntime, Runtime, compare_arrays
from pipeline.deploying import engine_predictor
from pipeline.job import Job
from pipeline.main import run_job
from pipeline.run import Run

MAX_CALIBRATION_IMAGES = 300
PARITY_IMAGES = 8
PARITY_MEAN_SCORE = 0.001  # sound engines stay below 0.0005


OURS: dict[str, tuple[str, ...]] = {
    "int8": (),
    "int8, bias correction": ("quant.bias_correction=true",),
    "int8, adaround": ("quant.adaround=true", "quant.bias_correction=true"),
}
"""Octet's own variants: the defaults, and the repairs that cost a second pass (NNCF corrects biases by default)."""


@dataclass
class Row:
    """One tool and variant.

    Attributes:
        ap_openvino, ap_literal: AP by OpenVINO and by ONNX Runtime without optimizations; None where not measured.
        score_difference: mean difference of class scores between the two on a few images.
    """

    tool: str
    variant: str
    ap_openvino: float | None = None
    ap_literal: float | None = None
    score_difference: float | None = None

    @property
    def best(self) -> float:
        """The better of the two figures."""
        return max(value for value in (self.ap_openvino, self.ap_literal) if value is not None)


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_peer_options(parser)
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    peers = find_peers(options)
    if not overrides or not peers:
        print("skipped: this comparison needs +experiment=... weights=... data.root=... and a peer")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        job = octet_job(overrides, folder / "run")
        rows = ours(job, folder, overrides)
        rows += [row for peer in peers.values() for row in theirs(job, peer, folder)]
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
    """How far each INT8 row of Octet, as OpenVINO runs it, lies above the best row of any peer."""
    best = max((row for row in rows if row.tool != "octet"), key=lambda row: row.best)
    found = {}
    for row in rows:
        if row.tool == "octet" and row.variant in OURS and row.ap_openvino is not None:
            found[row.variant] = row.ap_openvino - best.best
            print(f"octet {row.variant}: {found[row.variant]:+.4f} against {best.tool} {best.variant}")
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


def ours(job: Job, folder: Path, overrides: list[str]) -> list[Row]:
    """Rows of Octet: torch's float and calibrated figures, and the engines."""
    run = {row["name"]: row["ap"] for row in job.run.rows()}
    rows = [Row("octet", f"{name}, torch", ap_literal=run[name]) for name in ("float", "ptq")]
    rows.append(measured(job, Row("octet", "float"), job.run.path("float.onnx"), folder))
    for variant, settings in OURS.items():
        name = "-".join(["run", *variant.replace(",", "").split()[1:]])
        variant_job = octet_job([*overrides, *settings], folder / name)
        rows.append(measured(job, Row("octet", variant), variant_job.run.path("model.onnx"), folder))
    return rows


def theirs(job: Job, peer: Peer, folder: Path) -> list[Row]:
    """Rows of one peer."""
    images = calibration_images(job)
    floating = job.run.path("float.onnx")
    rows = []
    for variant, arguments in VARIANTS[peer.name].items():
        stem = folder / f"{peer.name}-{variant.replace(' ', '-')}"
        print(f"{peer.name}, {variant}: {len(images)} calibration images", flush=True)
        onnx = peer.quantize(floating, images, stem.with_suffix(".onnx"), arguments)
        rows.append(measured(job, Row(peer.name, variant), onnx, folder))
        if peer.name == "nncf":  # its first backend, with a model of its own
            xml = peer.quantize(floating, images, stem.with_suffix(".xml"), arguments)
            rows.append(measured(job, Row(peer.name, f"{variant}, OpenVINO's model"), xml, folder))
    return rows


def calibration_images(job: Job) -> np.ndarray:
    """The images of Octet's own calibration, float32 [N, 3, H, W]."""
    images = torch.cat(list(job.calibration_images())).numpy()
    return images[:MAX_CALIBRATION_IMAGES]


def measured(job: Job, row: Row, engine: Path, folder: Path) -> Row:
    """AP by OpenVINO, and literally for an ONNX file; figures that the folder has are not measured again."""
    label = f"{row.tool} {row.variant}"
    kept = folder / "figures" / f"{label}.json"
    if kept.exists():
        return Row(**json.loads(kept.read_text()))
    with OpenVINORuntime(engine, "f32", batch=1) as runtime:
        row.ap_openvino = job.measure(engine_predictor(job, runtime), f"{label}, OpenVINO", 1).ap
        if engine.suffix == ".onnx":
            with ONNXRuntime(engine, optimize=False) as reference:
                row.score_difference = score_difference(job, runtime, reference)
                row.ap_literal = job.measure(engine_predictor(job, reference), f"{label}, literal", 1).ap
    if row.score_difference is not None and row.score_difference > PARITY_MEAN_SCORE:
        print(f"{label}: OpenVINO computes something else than the graph says ({row.score_difference:.4f})")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(asdict(row)) + "\n")
    return row


def score_difference(job: Job, runtime: Runtime, reference: Runtime) -> float:
    """Mean difference of class scores between two engines of one graph."""
    batches = job.letterboxed(job.val_set, 1, PARITY_IMAGES)
    images = [to_input(batch.images, torch.device("cpu")).numpy() for batch in batches]
    outputs = [np.concatenate([r.infer(image) for image in images]) for r in (runtime, reference)]
    return compare_arrays(outputs[0], outputs[1]).score_mean


def print_table(rows: list[Row]) -> None:
    """The table as Markdown."""
    print("\n| tool | variant | AP, OpenVINO | AP, literal | mean score difference |")
    print("| --- | --- | ---: | ---: | ---: |")
    for row in rows:
        values: list[Any] = [row.ap_openvino, row.ap_literal, row.score_difference]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        print(f"| {row.tool} | {row.variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
