"""Which memory layout of activations is faster in training or inference, measured on the network itself.

On CPUs convolutions of oneDNN read channels-last as it is and convert contiguous tensors; on GPUs tensor cores do. How
much that gains, and whether the other operators of a network lose it again, depends on the machine and the network.
Layers keep the layout of their input, so that it is enough to lay out the images; weights stay as they are.
"""

from __future__ import annotations

import copy
import logging
import math
import time

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.choices import BFLOAT16, CHANNELS_LAST, CONTIGUOUS, FLOAT32

log = logging.getLogger(__name__)
FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
GAIN = 0.03  # share of the time by which channels-last must be faster to be chosen
PRECISION_GAIN = 0.1  # the same of bfloat16, which rounds


def measure_layouts(
    network: nn.Module, images: Tensor, autocast: bool = False, rounds: int = 3, backward: bool = True
) -> dict[str, float]:
    """Seconds of a forward and backward pass by layout, the least of several rounds; the network stays as it is.

    Args:
        network: images -> tensors in any nesting.
        images: float [B, C, H, W].
        autocast: whether it will train under autocast to bfloat16.
        rounds: passes in each layout, after one that warms up; the layouts take turns.
        backward: whether to train; else only the forward pass is measured, in evaluation mode.

    Returns:
        Infinite for channels-last where the network does not run in it (a `view` across channels, say).
    """
    network = copy.deepcopy(network).train(backward)
    best = dict.fromkeys(FORMATS, math.inf)
    for number in range(rounds + 1):
        for name, layout in FORMATS.items():
            start = _now(images)
            try:
                laid_out = images.contiguous(memory_format=layout)
                _step(network, laid_out, autocast) if backward else _infer(network, laid_out)
            except RuntimeError as error:
                if name == CONTIGUOUS or isinstance(error, torch.OutOfMemoryError):
                    raise
                log.info("the network does not run in %s: %s", name, str(error).splitlines()[0])
                return {**best, name: math.inf}
            if number > 0:
                best[name] = min(best[name], _now(images) - start)
    return best


def _step(network: nn.Module, images: Tensor, autocast: bool) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        outputs = [leaf for leaf in tree_leaves(network(images)) if isinstance(leaf, Tensor)]
    torch.stack([leaf.float().square().mean() for leaf in outputs if leaf.requires_grad]).sum().backward()


@torch.inference_mode()
def _infer(network: nn.Module, images: Tensor) -> None:
    network(images)


def faster_layout(seconds: dict[str, float]) -> str:
    """The layout to use: channels-last where it gains enough to count."""
    return CHANNELS_LAST if seconds[CHANNELS_LAST] < (1 - GAIN) * seconds[CONTIGUOUS] else CONTIGUOUS


def faster_precision(float32: float, bfloat16: float) -> str:
    """The precision to use, from the seconds of both: bfloat16 where it gains enough to round for."""
    return BFLOAT16 if bfloat16 < (1 - PRECISION_GAIN) * float32 else FLOAT32


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
