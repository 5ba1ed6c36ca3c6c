"""The codes of fake quantization: which one every value of a quantized tensor has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quant.fake_quantize import FakeQuantize, Mode
from quant.insertion import placement_of


class _Recorder(fx.Interpreter):
    """Runs a model node by node and keeps what its quantizers give, as codes."""

    def __init__(self, model: fx.GraphModule, forced: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.forced = forced
        self.names = {site.node: site.name for group in placement_of(model).groups for site in group.tensors}
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        quantizer = self.submodules.get(n.target) if n.op == "call_module" else None
        if isinstance(quantizer, FakeQuantize):
            name = self.names[n.all_input_nodes[0].name]
            if quantizer.mode is not Mode.QUANTIZE:
                raise ValueError(
                    f"{name}: its quantizer is {quantizer.mode.value}: switch the quantizers on before reading codes"
                )
            self.codes[name] = quantizer.grid.ranks(result / quantizer.scale).cpu()
            if name in self.forced:
                result = quantizer.grid.ranked(self.forced[name].to(result.device)) * quantizer.scale
        return result


def activation_codes(
    model: fx.GraphModule, images: Tensor, forced: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Codes of every activation quantizer for a batch.

    Args:
        model: quantized, in evaluation mode, its quantizers on.
        images: float32 [B, 3, H, W] in 0..1, on the model's device.
        forced: codes by name of the tensor that its quantizer passes on instead of its own; what is returned
            are its own. With all codes of another implementation, every quantizer shows only what its own layer does
            differently.

    Returns:
        Name of the tensor in the placement -> int16 tensor of the shape of the quantized one, in steps from zero.

    Raises:
        ValueError: the quantizers are off.
    """
    recorder = _Recorder(model, forced or {})
    with torch.inference_mode():
        recorder.run(images)
    return recorder.codes
