"""The fixed-point report of a run: the codes of the exported graph compared with those of torch, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import DeployError
from data import to_input
from deploy import compare_codes
from deploy.parity.codes import Codes
from deploy.runtimes.onnxruntime import CodeRecorder
from deploy.targets.resize import REPEATED
from pipeline.job import Job
from pipeline.run.progress import say, track
from quant import QUANTIZER, activation_codes

FIXED_POINT = "fixed_point.json"
SUFFIX = f"{QUANTIZER}/QuantizeLinear"  # after the name of a tensor: its quantizer in the graph


def compare_fixed_point(job: Job, path: Path) -> None:
    """Write fixed_point.json: how many codes of an INT8 graph differ from torch's, and by how many steps.

    Args:
        job: the job.
        path: ONNX file of the best quantized model, for a target that `is_exact`.
    """
    pairs = list(_codes(job, path))
    report = compare_codes((graph, free) for graph, free, _ in pairs)
    local = compare_codes((graph, forced) for graph, _, forced in pairs)
    content = report.as_dict()
    content["tensors"] = [
        {**tensor, "differing_locally": alone.differing}
        for tensor, alone in zip(content["tensors"], local.tensors, strict=True)
    ]
    sentence = f"per layer, {local.describe()}; end to end, {report.describe()}"
    local_figures = {key: value for key, value in local.as_dict().items() if key in ("share", "steps")}
    job.run.write_json(FIXED_POINT, {"sentence": sentence, **content, "local": local_figures})
    say(f"fixed point: {sentence}")


def _codes(job: Job, path: Path) -> Iterator[tuple[dict[str, Codes], dict[str, Codes], dict[str, Codes]]]:
    """For every image codes of the graph, of torch, and of torch where each layer reads the graph's codes."""
    model = job.networks.best()[0]
    recorder = CodeRecorder(path)
    config = job.config.deploy
    size = config.graph_batch
    loader = job.splits.letterboxed(job.splits.val, size, max(config.fixed_point_images, size))
    for batch in track(loader, "fixed point", len(loader)):
        if len(batch.images) < size:
            continue
        images = to_input(batch.images, job.device)
        in_graph = {}
        for name, codes in recorder.codes(np.asarray(images.cpu().numpy(), np.float32)).items():
            if name.endswith(f"{REPEATED}/QuantizeLinear"):
                continue  # the codes of the tensor before, moved
            if not name.endswith(SUFFIX):
                raise DeployError(
                    f"Quantizer '{name}' of {path.name} is not named by a path; export it again."
                )
            in_graph[name.removesuffix(SUFFIX)] = codes
        forced = {name: torch.from_numpy(codes) for name, codes in in_graph.items()}
        free, locally = activation_codes(model, images), activation_codes(model, images, forced)
        yield in_graph, to_arrays(free), to_arrays(locally)


def to_arrays(codes: dict[str, Tensor]) -> dict[str, Codes]:
    """Tensors as NumPy arrays."""
    return {name: np.asarray(tensor.numpy(), np.int16) for name, tensor in codes.items()}
