"""Estimated time of an engine's kernels on a GPU that is not here: a roofline over what the compiler says of them.

A kernel takes as long as its bytes need at the memory bandwidth or its multiply-accumulates at the tensor throughput of
its precision, whichever is more, and a fixed cost besides:

    t = max(bytes / bandwidth, 2 MACs / throughput) + launch

(Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785). Bytes are those of inputs, outputs and constants: no
cache is modelled, so a GPU whose cache holds the activations is faster than this says. It is an estimate for comparing
plans of one network on one GPU, not a latency.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from onnx import ModelProto

from core.errors import DeployError
from deploy.autotune.blocks import Blocks
from deploy.autotune.gpus import GPU
from deploy.compile.kernels import Kernel
from deploy.compile.report import PRECISIONS, kernel_of
from deploy.graph.view import View

RATES = {**PRECISIONS, "BFloat16": "fp16"}  # tensor cores multiply both at one rate


def kernel_milliseconds(kernel: Kernel, macs: int, gpu: GPU) -> float:
    """Estimated time of one kernel that does `macs` multiply-accumulates.

    Raises:
        DeployError: it multiplies in a precision that the GPU has no figure for.
    """
    num_bytes = kernel.moved_bytes + sum(tensor.num_bytes for tensor in kernel.constants)
    seconds = num_bytes / (gpu.gigabytes_per_second * 1e9)
    if macs:
        precision = RATES.get(kernel.inputs[0].type, kernel.inputs[0].type)
        if precision not in gpu.teraops:
            raise DeployError(
                f"{gpu.title} has no throughput for {precision}, which kernel {kernel.name} multiplies in: add it "
                "to the file of autotune.gpu_file, or choose another GPU."
            )
        seconds = max(seconds, 2 * macs / (gpu.teraops[precision] * 1e12))
    return seconds * 1e3 + gpu.kernel_microseconds / 1e3


def count_products(model: ModelProto, kernels: Sequence[Kernel]) -> dict[str, int]:
    """Multiply-accumulates at batch 1 by kernel, of the convolutions and matrix products.

    Args:
        model: the graph that was compiled.
        kernels: its kernels.
    """
    view = View(model)
    found: Counter[str] = Counter()
    for node in [*view.weighted(), *view.matmuls()]:
        kernel = kernel_of(node.name, kernels)
        if kernel is not None:
            found[kernel.name] += view.multiply_accumulates(node) or 0
    return dict(found)


def estimate_blocks(
    kernels: Sequence[Kernel], macs: Mapping[str, int], blocks: Blocks, gpu: GPU
) -> dict[str, float]:
    """Estimated milliseconds of every block of a build at batch 1; their sum is the engine's estimate.

    Args:
        kernels: kernels of the build.
        macs: multiply-accumulates by kernel, see `count_products`.
        blocks: blocks of the network, by the names of its nodes.
        gpu: where it would run.
    """
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        found[blocks.of_kernel(kernel.nodes)] += kernel_milliseconds(kernel, macs.get(kernel.name, 0), gpu)
    return dict(found)
