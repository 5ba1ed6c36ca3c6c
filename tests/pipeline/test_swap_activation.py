"""`quant.swap_activation`: the quantized network has another activation, the float network and teacher keep theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from configs.compose import compose
from configs.schema import Config
from configs.validation import validate
from core.errors import ConfigError, DeployError, RunError
from deploy import export_onnx
from deploy.check.report import check_graph
from deploy.runtimes.tensorrt import TensorRTRuntime
from models import build_detector, fold_detector, swap_activation
from pipeline.input_check import check_fine_tuned
from pipeline.job import Job
from pipeline.main import plan_job
from pipeline.networks import Networks
from pipeline.run.directory import Run
from pipeline.run.ledger import Inputs
from pipeline.stages.activation import Candidate, candidates_of, choose_candidate
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


BCCD = (("silu", 0.5985, 11.9), ("relu", 0.5020, 9.4), ("hardswish", 0.5844, 10.1))  # GELAN-t, OpenVINO


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        (BCCD, "hardswish"),  # relu is faster, and loses more than fine-tuning recovers
        ((("silu", 0.5, 10), ("relu", 0.4705, 8), ("hardswish", 0.5, 9)), "relu"),
        ((("silu", 0.5, 10), ("relu", 0.4695, 8), ("hardswish", 0.5, 9)), "hardswish"),
        ((("silu", 0.5, 10), ("relu", 0.5, 9.49), ("hardswish", 0.5, 9.6)), "relu"),
        ((("silu", 0.5, 10), ("relu", 0.5, 9.51), ("hardswish", 0.5, 9.6)), "silu"),
        ((("silu", 0.5, 10), ("relu", 0.4, 5), ("hardswish", 0.46, 6)), "silu"),
        ((("silu", 0.5, 10), ("relu", math.nan, 5), ("hardswish", 0.5, math.nan)), "silu"),
        ((("silu", 0.5, 10), ("relu", 0.49, 8)), "relu"),
        ((("silu", 0.5, 10),), "silu"),
    ],
)
def test_the_fastest_that_is_accurate_enough_and_clearly_faster_is_chosen(
    figures: Sequence[tuple[str, float, float]], chosen: str
) -> None:
    """At most 0.03 AP below SiLU after calibration, and at least 5 % faster."""
    assert choose_candidate([Candidate(*figure) for figure in figures]).activation == chosen


def auto(*more: str) -> Config:
    return compose(["+experiment=demo", "quant.swap_activation=auto", *more])


def test_hard_swish_is_no_candidate_for_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = {
        runtimes: candidates_of(Job(auto(f"deploy.runtimes=[{runtimes}]"), Run(tmp_path)))
        for runtimes in ("openvino", "openvino,onnxruntime")
    }
    assert found["openvino"] == ["silu", "relu", "hardswish"]
    assert found["openvino,onnxruntime"] == ["silu", "relu"]
    assert "hardswish has no integer kernel in ONNX Runtime" in capsys.readouterr().err


def test_auto_is_refused_where_it_cannot_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"auto with stages=\[calibrate,report\].*add finetune to stages"):
        validate(auto("stages=[calibrate,report]"))
    with pytest.raises(ConfigError, match=r"swap_activation=auto with qat\.both_heads=true"):
        validate(auto("qat.both_heads=true"))
    validate(auto("stages=[report]"))  # of a run that has decided
    monkeypatch.setattr(TensorRTRuntime, "require", refuse)
    with pytest.raises(
        ConfigError,
        match=r"auto times engines, and deploy\.runtimes=\[tensorrt\]: expected one that runs on this machine "
        r"\(no GPU\); choose with quant\.swap_activation=relu or quant\.swap_activation=hardswish",
    ):
        plan_job(auto("deploy=trt10", "stages=[train,calibrate,finetune]"))
    few = ("data.synthetic.train=4", "data.synthetic.val=4", "data.synthetic.size=96", "data.image_size=96")
    for setting in ("auto", "relu"):
        with pytest.raises(ConfigError, match=f"swap_activation={setting}: the network has no SiLU module"):
            plan_job(auto("model.activation=relu", f"quant.swap_activation={setting}", *few))
    assert not (tmp_path / "runs/demo").exists()


@pytest.mark.parametrize("name", ["relu", "hardswish"])
def test_a_swapped_network_is_not_exported_without_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("data.synthetic.train=4", "data.synthetic.val=4", "data.synthetic.size=96", "data.image_size=96")
    base = ("+experiment=demo", f"quant.swap_activation={name}", *few)
    with pytest.raises(
        ConfigError,
        match=rf"swap_activation={name} with stages=\[train,calibrate,export\].*add finetune to stages",
    ):
        plan_job(compose([*base, "stages=[train,calibrate,export]"]))
    assert not (tmp_path / "runs").exists()  # found before the images are made
    for stages in ("train,calibrate,report", "train,calibrate,finetune,export"):
        plan_job(compose([*base, f"stages=[{stages}]"]))
    run = Run.create(tmp_path / "run", "demo")
    job = Job(compose([*base, "stages=[export]"]), run)
    with pytest.raises(ConfigError, match=r"with stages=\[export\]"):
        check_fine_tuned(job, {"export"})
    run.ledger.finish("finetune", Inputs({}, {}), {}, 1.0)
    check_fine_tuned(job, {"export"})


def refuse(*_: object) -> None:
    raise DeployError("no GPU")


def test_the_student_follows_the_choice_of_the_run(tmp_path: Path) -> None:
    networks = Networks(auto(), Run(tmp_path), None, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="`place` makes it"):
        networks.swap  # noqa: B018
    networks.keep(fold_detector(build_detector("yolov9t", 3)))
    network = networks.detector.network
    with networks.swapped("relu"):
        assert kinds(networks.student)[nn.ReLU] > 100
    for chosen, kind in ((None, nn.SiLU), ("hardswish", nn.Hardswish)):
        (tmp_path / "activation.json").write_text(json.dumps({"activation": chosen}))
        vars(networks).pop("student", None)
        assert kinds(networks.student)[kind] == kinds(network)[nn.SiLU]
