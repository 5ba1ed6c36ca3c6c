"""Batch-normalisation folding: the arithmetic that `models` and `quant` share.

A normalisation (x - mean) / sqrt(var + eps) * gamma + beta after a layer with weight W and bias b is part of the layer
when, per output channel and with g = gamma / sqrt(var + eps),

    W' = W * g        b' = beta + (b - mean) * g

All sums are done in float64, for any type of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def gain_of(norm: BatchNorm) -> Tensor:
    """What a normalisation multiplies each channel with, float64 [channels]. It must keep running statistics."""
    assert norm.running_var is not None
    deviation = torch.sqrt(norm.running_var.double() + norm.eps)
    return norm.weight.detach().double() / deviation if norm.affine else 1 / deviation


def folded_parameters(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does a normalisation's work, too.

    Args:
        weight: [output channels, ...].
        bias: [output channels], or None.
        norm: the normalisation after the layer; it must keep running statistics.

    Returns:
        Weight and bias, float64.
    """
    assert norm.running_mean is not None
    gain = gain_of(norm)
    shifted = (
        -norm.running_mean.double() if bias is None else bias.detach().double() - norm.running_mean.double()
    )
    beta = norm.bias.detach().double() if norm.affine else 0.0
    return weight.detach().double() * gain.reshape(-1, *(1,) * (weight.ndim - 1)), beta + shifted * gain
