"""Weights that flip between two grid points, and two ways to stop them.

Near a border between two grid points the straight-through gradient pushes a weight back and forth, and the weight the
network gets at the end is a matter of chance. After Nagel et al. (arXiv:2203.11086; for YOLO arXiv:2311.05109) a weight
oscillates in a step whose integer differs from the last step's in the direction opposite to its last move, and

    frequency <- m * oscillates + (1 - m) * frequency            (their equation 4)
    average   <- m * integer + (1 - m) * average

Freezing (their algorithm 1) fixes a weight whose frequency passes a threshold at round(average) for good. Dampening
(their equation 5) adds strength * sum of (w - round(w / s) s)^2 over weights inside the grid to the loss, which
pulls every weight to the middle of its cell.

All weights of a network are tracked in flat vectors, so that a step costs a few sweeps whatever the number of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.fake_quantize import Mode
from quant.insertion import quantized_layers

MOMENTUM = 0.02
OSCILLATING = 0.005  # frequency from which a weight counts as oscillating, as in the paper's tables


class OscillationTracker:
    """Follows the integers of every quantized weight from step to step, and freezes those that flip too often.

    Args:
        model: network with quantizers switched on; layers that are off are left alone.
        momentum: m above, 0..1.

    Attributes:
        frequency: flips per step, 0..1, of every weight, a flat vector in the order of the layers.
        frozen: the weights that are fixed, a flat bool vector.
    """

    def __init__(self, model: nn.Module, momentum: float = MOMENTUM) -> None:
        self.layers = [
            layer
            for layer in quantized_layers(model).values()
            if layer.weight_quantizer.mode is Mode.QUANTIZE
        ]
        self.momentum = momentum
        self.sizes = [layer.weight.numel() for layer in self.layers]
        self.codes = self._integers()
        self.direction = torch.zeros_like(self.codes)
        self.frequency = torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        self.average = self.codes.float()
        self.frozen = torch.zeros_like(self.codes, dtype=torch.bool)
        self.target = self.codes.clone()  # the integer of a frozen weight

    @torch.no_grad()
    def update(self, threshold: float | None = None) -> None:
        """Look at the weights after a step of the optimizer, and hold the frozen ones where they are.

        Args:
            threshold: frequency above which a weight is frozen from now on; None freezes nothing.
        """
        if not self.layers:
            return
        codes = torch.where(self.frozen, self.target, self._integers())
        move = (codes > self.codes).to(torch.int8) - (codes < self.codes).to(torch.int8)
        flips = (move != 0) & (move == -self.direction)
        self.frequency.lerp_(flips.float(), self.momentum)
        self.average.lerp_(codes.float(), self.momentum)
        self.direction = torch.where(move != 0, move, self.direction)
        self.codes = codes
        if threshold is not None:
            fresh = (self.frequency > threshold) & ~self.frozen
            self.target = torch.where(fresh, self.average.round().to(torch.int8), self.target)
            self.codes = torch.where(fresh, self.target, codes)
            self.frozen |= fresh
            self._hold()

    def shares(self) -> dict[str, float]:
        """Shares of the weights, 0..1: those that oscillate (frequency above 0.005, not frozen) and the frozen."""
        if not self.layers:
            return {}
        oscillating = (self.frequency > OSCILLATING) & ~self.frozen
        return {
            "share_oscillating": float(oscillating.float().mean()),
            "share_frozen": float(self.frozen.float().mean()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        names = ("codes", "direction", "frequency", "average", "frozen", "target")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: it is of a network with another number of quantized weights.
        """
        if state["codes"].shape != self.codes.shape:
            raise ValueError(
                f"the saved state follows {len(state['codes'])} weights, this network has {len(self.codes)}: it is "
                "of another network or placement; fine-tune anew"
            )
        for name, value in state.items():
            setattr(self, name, value.to(self.codes.device, copy=True))

    def _integers(self) -> Tensor:
        """Ranks of every weight's current code, for integer grids the code itself; a flat int8 vector."""
        if not self.layers:
            return torch.zeros(0, dtype=torch.int8)
        scaled = torch._foreach_div([layer.weight.detach().float() for layer in self.layers], self._scales())
        grids = [layer.weight_quantizer.grid for layer in self.layers]
        ranks = [grid.ranks(grid.codes(values, 1.0)) for values, grid in zip(scaled, grids, strict=True)]
        return torch.cat([values.flatten().to(torch.int8) for values in ranks])

    def _scales(self) -> list[Tensor]:
        return [layer.weight_quantizer.steps(layer.weight.ndim) for layer in self.layers]

    def _hold(self) -> None:
        """Put frozen weights on their integers, whatever the optimizer or the scale did."""
        if not bool(self.frozen.any()):
            return
        masks, targets = self.frozen.split(self.sizes), self.target.split(self.sizes)
        for layer, scale, mask, target in zip(self.layers, self._scales(), masks, targets, strict=True):
            shape = layer.weight.shape
            held = layer.weight_quantizer.grid.ranked(target.view(shape)) * scale
            layer.weight.copy_(torch.where(mask.view(shape), held, layer.weight))


def dampening_loss(model: nn.Module) -> Tensor:
    """Sum of squared distances of the weights to their grid points, a scalar; weights beyond the grid count nothing.

    Only the weights get a gradient; grid points and scales are constants here (arXiv:2203.11086, equation 5).
    """
    terms = []
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        if quantizer.mode is not Mode.QUANTIZE:
            continue
        scale = quantizer.steps(layer.weight.ndim)
        limit = scale * quantizer.grid.high
        inside = torch.minimum(torch.maximum(layer.weight, -limit), limit)
        point = quantizer.grid.round(inside.detach(), scale)
        terms.append((inside - point).square().sum())
    return torch.stack(terms).sum() if terms else torch.zeros(())
