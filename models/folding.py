"""Batch-normalisation folding and RepConv merging: what a deployed network computes, in fewer layers.

A normalisation becomes part of the convolution before it (core/folding.py). A smaller kernel in parallel to a larger
one is a kernel of the larger size that is zero around its centre, so both add up to one kernel. The sums are done in
float64 for any weights' type.
"""

import copy
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from core.folding import folded_parameters, gain_of
from models.blocks import ConvBlock, ConvNorm, RepConvBlock
from models.detector import Detector

_logger = logging.getLogger(__name__)


def fold_detector(detector: Detector) -> Detector:
    """Return a folded copy in evaluation mode; the detector itself is not changed.

    In the copy each `ConvBlock` is conv (with bias) + activation (its `bn` is an `nn.Identity`), and each
    `RepConvBlock` is one `ConvBlock` under the same name. The output is equal up to rounding. Imported ranges go
    with the layers; those of two merged kernels say nothing about their sum and are left out (and logged).
    """
    folded = copy.deepcopy(detector).eval()
    folded.amax = _folded_ranges(folded.network, detector.amax)
    fold_network(folded.network)
    folded.folded = True
    return folded


def fold_network(network: nn.Module) -> None:
    """Fold and merge every block of `network` in place. Blocks that are folded already stay as they are."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RepConvBlock):
                setattr(parent, name, _merge(child))
    for module in network.modules():
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm2d):
            weight, bias = _folded_weight(module)
            module.conv = _with_bias(module.conv, weight, bias)
            module.bn = nn.Identity()


def _folded_ranges(network: nn.Module, amax: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ranges of the layers that `fold_network` will leave, from those of the layers that are there now."""
    ranges = dict(amax)
    lost = []
    for name, module in network.named_modules():
        if isinstance(module, RepConvBlock):
            branches = [f"{name}.{branch}.conv" for branch in module.BRANCHES]
            inputs = [ranges.pop(f"{branch}.input") for branch in branches if f"{branch}.input" in ranges]
            if inputs:
                ranges[f"{name}.conv.input"] = torch.stack(inputs).amax()
            found = [f"{branch}.weight" for branch in branches if f"{branch}.weight" in ranges]
            lost += [key for key in found if ranges.pop(key) is not None]
        elif isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm2d):
            key = f"{name}.conv.weight"
            if key in ranges:
                ranges[key] = (ranges[key].double() * gain_of(module.bn).abs()).float()
    if lost:
        _logger.info("ranges of merged kernels left out: %s", ", ".join(lost))
    return ranges


def _folded_weight(block: ConvNorm) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a block, in float64. The block may be folded already."""
    conv, norm = block.conv, block.bn
    if conv.weight.is_meta:  # shapes alone, on which torch's arithmetic imports its compiler
        weight = torch.empty_like(conv.weight, dtype=torch.float64)
        return weight, weight.new_empty(len(weight))
    if isinstance(norm, nn.BatchNorm2d):
        return folded_parameters(conv.weight, conv.bias, norm)
    weight = conv.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()


def _with_bias(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A copy of `conv` that has this kernel and bias, in the type, on the device and in the mode of the original."""
    result = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        bias=True,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        result.weight.copy_(weight)
        result.bias.copy_(bias)
    return result.train(conv.training)


def _merge(block: RepConvBlock) -> ConvBlock:
    """One `ConvBlock`, already folded, that computes what the two branches compute together."""
    large, small = block.branches
    large_weight, large_bias = _folded_weight(large)
    small_weight, small_bias = _folded_weight(small)
    margin = (large_weight.shape[-1] - small_weight.shape[-1]) // 2
    conv = large.conv
    if not conv.weight.is_meta:
        large_weight = large_weight + nn.functional.pad(small_weight, (margin,) * 4)
        large_bias = large_bias + small_bias
    merged = ConvBlock(conv.in_channels, conv.out_channels, 1, groups=conv.groups)
    merged.conv = _with_bias(conv, large_weight, large_bias)
    merged.bn = nn.Identity()
    merged.act = block.act
    return merged.train(block.training)
