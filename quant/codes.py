"""The integers behind fake quantization: which code every value of a quantized tensor has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quant.fake_quantize import FakeQuantize, Mode
from quant.insertion import ACTIVATION_QUANTIZERS, placement_of


def quantizer_calls(model: fx.GraphModule) -> dict[str, str]:
    """Name of each call of an activation quantizer -> name of the tensor of the placement that it quantizes.

    A group's quantizer is called once for each of its tensors: `activation_quantizers.3`, `activation_quantizers.3_1`
    and so on, in the order of the graph. Exported files name their quantizers in the same way.
    """
    tensors = {site.node: site.name for group in placement_of(model).groups for site in group.tensors}
    return {name: tensors[node.all_input_nodes[0].name] for node, name in _calls(model).items()}


def _calls(model: fx.GraphModule) -> dict[fx.Node, str]:
    counts: dict[str, int] = {}
    names = {}
    for node in model.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target.startswith(f"{ACTIVATION_QUANTIZERS}."):
            number = counts.get(target, 0)
            counts[target] = number + 1
            names[node] = f"{target}_{number}" if number else target
    return names


class _Recorder(fx.Interpreter):
    """Runs a model node by node and keeps what its quantizers give, as codes."""

    def __init__(self, model: fx.GraphModule, forced: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.forced = forced
        self.names = _calls(model)
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = self.names.get(n)
        if name is not None:
            quantizer = self.module.get_submodule(str(n.target))
            assert isinstance(quantizer, FakeQuantize)
            if quantizer.mode is not Mode.QUANTIZE:
                raise ValueError(
                    f"{name} is {quantizer.mode.value}: switch the quantizers on before reading codes"
                )
            self.codes[name] = (result / quantizer.scale).round().to(torch.int16).cpu()
            if name in self.forced:
                result = self.forced[name].to(result) * quantizer.scale
        return result


def activation_codes(
    model: fx.GraphModule, images: Tensor, forced: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Codes of every activation quantizer for a batch.

    Args:
        model: quantized, in evaluation mode, its quantizers on.
        images: float32 [B, 3, H, W] in 0..1, on the model's device.
        forced: codes, by name, that go on from a quantizer in the place of its own; what is returned are its own. With
            all codes of another implementation, every quantizer shows only what its own layer does differently.

    Returns:
        Name of the call (see `quantizer_calls`) -> int16 tensor of the shape of the quantized one, in steps from zero.

    Raises:
        ValueError: the quantizers are off.
    """
    recorder = _Recorder(model, forced or {})
    with torch.inference_mode():
        recorder.run(images)
    return recorder.codes
