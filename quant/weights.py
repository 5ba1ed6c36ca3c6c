"""Fake quantization of the weights of several layers in one call, for training on a CPU.

A weight is small: its arithmetic takes a few microseconds, and the way there, through Python and autograd, a hundred.
So `quant.fusing` lets layers that follow each other get their weights together. The groups are small enough that
gradients come during the backward pass, so that processes can exchange them meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.grid import Grid
from quant.fake_quantize import Mode, scales_of
from quant.layers import QuantizedLayer
from quant.native.kernel import Kernel, in_layout_of, is_in_rows, weights_kernel
from quant.rounding import open_bounds

NUM_TOGETHER = 16  # layers; GELAN-t has 179


class _FakeQuantizeWeights(torch.autograd.Function):
    """Per-channel fake quantization of weights, with gradients for them and for the logarithms of their scales."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, grid: Grid, steps: tuple[Tensor, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights = tensors[: len(steps)]
        ctx.save_for_backward(*weights, *steps)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.grid = kernel, grid
        results = tuple(torch.empty_like(weight) for weight in weights)
        kernel.round_each(weights, steps, grid, results)
        return results

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        count, learned = len(outer), ctx.needs_input_grad[3 + len(outer) :]
        weights, steps = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        found: list[Tensor | None] = [None] * (2 * count)
        given = {i: in_layout_of(weights[i], g) for i, g in enumerate(outer) if g is not None}
        places = list(given)
        grads = [torch.empty_like(weights[i]) for i in places]
        sums = [torch.empty(steps[i].numel()) if learned[i] else None for i in places]
        ctx.kernel.gradients_each(
            list(given.values()),
            [weights[i] for i in places],
            [steps[i] for i in places],
            ctx.grid,
            open_bounds(ctx.grid.low, ctx.grid.high),
            grads,
            sums,
        )
        for i, grad, of_scales in zip(places, grads, sums, strict=True):
            found[i], found[count + i] = grad, of_scales
        return None, None, None, *found


def quantized_weights(*layers: QuantizedLayer) -> tuple[Tensor | None, ...]:
    """The quantized weights of layers whose quantizers have one grid; None for those that are to do it themselves.

    That is all of them where no gradient is taken, or where there is no native kernel.
    """
    found: list[Tensor | None] = [None] * len(layers)
    kernel = weights_kernel() if torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export() else None
    places = [place for place, layer in enumerate(layers) if _is_ready(layer)] if kernel else []
    if kernel and places:
        weights = [layers[place].weight for place in places]
        quantizers = [layers[place].weight_quantizer for place in places]
        for quantizer, weight in zip(quantizers, weights, strict=True):
            quantizer.before_rounding(weight)
        steps, logarithms = scales_of(*quantizers), [quantizer.log_scale for quantizer in quantizers]
        results = _FakeQuantizeWeights.apply(kernel, quantizers[0].grid, steps, *weights, *logarithms)
        for place, result in zip(places, results, strict=True):
            found[place] = result
    return tuple(found)


def _is_ready(layer: QuantizedLayer) -> bool:
    """Whether the weight is to be quantized, and the kernel reads it."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    return (
        quantizer.mode is Mode.QUANTIZE
        and not quantizer.grid.is_fp8
        and not (quantizer._forward_hooks or quantizer._forward_pre_hooks)
        and is_in_rows(weight, quantizer.axis if quantizer.log_scale.numel() > 1 else None)
    )
