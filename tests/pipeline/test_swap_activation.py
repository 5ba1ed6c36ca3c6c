"""`quant.swap_activation`: the quantized network has another activation, the float network and teacher keep theirs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from configs.compose import compose
from configs.validation import validate
from core.errors import ConfigError
from deploy import export_onnx
from deploy.check.report import check_graph
from models import build_detector, fold_detector, swap_activation
from pipeline.networks import Networks
from pipeline.run.directory import Run
from pipeline.stages.export import Deployed
from quant import Mode, activation_quantizers, place, quantized_layers, set_mode

SIZE = (64, 64)


def kinds(network: nn.Module) -> dict[type[nn.Module], int]:
    counts = {kind: 0 for kind in (nn.SiLU, nn.ReLU, nn.Hardswish)}
    for module in network.modules():
        if type(module) in counts:
            counts[type(module)] += 1
    return counts


def formula(name: str, x: float) -> float:
    """ReLU, and hard-swish as x relu6(x + 3) / 6."""
    return max(x, 0.0) if name == "relu" else x * min(max(x + 3, 0.0), 6.0) / 6


@pytest.mark.parametrize("name", ["relu", "hardswish"])
def test_every_silu_is_replaced_in_a_copy(name: str) -> None:
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.SiLU(), nn.Sequential(nn.SiLU(), nn.Sigmoid())).eval()
    swapped = swap_activation(block, name)
    assert kinds(block)[nn.SiLU] == 2
    assert kinds(swapped)[nn.SiLU] == 0
    assert torch.equal(swapped[0].weight, block[0].weight)  # type: ignore[index]
    assert swapped[0].weight is not block[0].weight  # type: ignore[index]
    weight, bias = block[0].weight.item(), block[0].bias.item()  # type: ignore[index, union-attr, operator]
    for x in (-7.0, -2.5, -0.3, 0.0, 0.4, 2.9, 8.0):
        inner = formula(name, formula(name, weight * x + bias))
        wanted = 1 / (1 + torch.tensor(-inner).exp().item())
        assert swapped(torch.full((1, 1, 1, 1), x)).item() == pytest.approx(wanted, abs=1e-6)


def test_what_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(ConfigError, match="no SiLU module to replace"):
        swap_activation(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), "relu")
    with pytest.raises(ConfigError, match="'gelu' cannot replace SiLU: choose relu or hardswish"):
        swap_activation(nn.SiLU(), "gelu")
    with pytest.raises(ConfigError, match=r"quant\.swap_activation=relu with qat\.both_heads=true"):
        validate(compose(["+experiment=demo", "quant.swap_activation=relu", "qat.both_heads=true"]))
    for deploy in ("deploy=onnxruntime", "deploy.runtimes=[openvino,onnxruntime]"):
        with pytest.raises(
            ConfigError, match=r"hardswish with ONNX Runtime.*use quant\.swap_activation=relu"
        ):
            validate(compose(["+experiment=demo", "quant.swap_activation=hardswish", deploy]))
    validate(compose(["+experiment=demo", "quant.swap_activation=hardswish", "deploy.runtimes=[openvino]"]))


@pytest.mark.parametrize(("name", "kind"), [("relu", nn.ReLU), ("hardswish", nn.Hardswish)])
def test_the_student_is_swapped_and_its_graph_has_no_finding(
    tmp_path: Path, name: str, kind: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    config = compose(["+experiment=demo", f"quant.swap_activation={name}"])
    networks = Networks(config, Run(tmp_path), None, torch.device("cpu"))  # type: ignore[arg-type]
    networks.keep(fold_detector(build_detector("yolov9t", 3)))
    num_silu = kinds(networks.detector.network)[nn.SiLU]
    assert num_silu > 100
    assert kinds(networks.student)[kind] == num_silu
    assert kinds(networks.student)[nn.SiLU] == 0

    model = networks.insert(place(networks.student))
    assert kinds(model)[kind] > 0
    assert kinds(model)[nn.SiLU] == 0
    for quantizer in activation_quantizers(model).values():
        quantizer.set_scale(0.02)
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_scale(layer.weight_quantizer.amax_scale(layer.weight), layer.weight)
    set_mode(model, Mode.QUANTIZE)
    path = export_onnx(
        Deployed(model, networks.detector.decode).eval(), tmp_path / "model.onnx", SIZE, "openvino", {}
    ).path
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("HardSwish" in operators) == (name == "hardswish")
    assert ("Relu" in operators) == (name == "relu")
    assert check_graph(path) == []
