"""The fixed-point report of a run: the codes of the exported graph beside those of torch, image by image."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import to_input
from deploy import DeployError, compare_codes
from deploy.fixed_point import Codes
from deploy.onnx_runtime import CodeRecorder
from pipeline.deploying import export_quantized, export_stage, model_name, targets
from pipeline.job import Job
from pipeline.progress import say, track
from quant import activation_codes, quantizer_calls

FIXED_POINT = "fixed_point.json"
SCOPE = "/network/"  # of the network inside what is exported
REFERENCES = ("trt10", "openvino")  # targets whose graphs quantize what torch quantizes, and nothing else


def export_and_compare(job: Job) -> None:
    """The stage `export`: files for every target, then their codes beside those of torch."""
    export_stage(job)
    compare_fixed_point(job)


def compare_fixed_point(job: Job) -> None:
    """Write fixed_point.json: how many codes of the INT8 graph differ from torch's, and by how many steps."""
    if not job.config.deploy.fixed_point_images:
        return
    with tempfile.TemporaryDirectory() as folder:
        target = next((name for name in REFERENCES if name in targets(job)), None)
        if target is None:
            path = Path(folder) / "signed.onnx"
            export_quantized(job, "trt10", path)
        else:
            path = job.run.path(model_name(job, target))
        report = compare_codes(_pairs(job, path))
    tensors = quantizer_calls(job.best_quantized()[0])
    content = report.as_dict()
    content["tensors"] = [{**tensor, "name": tensors[tensor["name"]]} for tensor in content["tensors"]]
    job.run.write_json(FIXED_POINT, {"sentence": report.describe(), **content})
    say(f"fixed point: {report.describe()}")


def _pairs(job: Job, path: Path) -> Iterator[tuple[dict[str, Codes], dict[str, Codes]]]:
    """(codes of the graph, codes of torch) of every image."""
    model = job.best_quantized()[0]
    number = job.config.deploy.fixed_point_images
    recorder = CodeRecorder(path)
    loader = job.letterboxed(job.val_set, 1, number)
    for batch in track(loader, "fixed point", len(loader)):
        images = to_input(batch.images, job.device)
        in_torch = {name: codes.numpy() for name, codes in activation_codes(model, images).items()}
        in_graph = {}
        for name, codes in recorder.codes(np.asarray(images.cpu().numpy(), np.float32)).items():
            if not name.startswith(SCOPE):
                raise DeployError(f"Quantizer '{name}' of {path.name} lies outside {SCOPE}; export it again.")
            in_graph[name.removeprefix(SCOPE).rsplit("/", 1)[0]] = codes
        yield in_graph, in_torch
