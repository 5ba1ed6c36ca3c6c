"""The plan from the command line: placed, printed, edited, passed back; and every kind of policy rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from main_job import TINY, run_entry, untrained_weights

from pipeline.commands import placement

POLICY = (
    "quant.policy=["
    "{match: input.images, scale: 0.007874},"
    "{match: backbone.stem1.act, observer: minmax},"
    "{match: backbone.stem2.act, bits: 7},"
    "{match: neck.cat_0, share: false},"
    "{match: 'head.cls.0.*', keep_float: true},"
    "{match: head.box.0.output, keep_float: false}]"
)


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Working folder with a run of the stage `place` over measured concats and the rules above; what it printed."""
    folder = tmp_path_factory.mktemp("plan")
    outcome = run_entry(
        "train_qat.py",
        *TINY,
        untrained_weights(folder),
        "stages=[place]",
        "quant.share_concat_scales=measured",
        POLICY,
        cwd=folder,
        timeout=550,
    )
    assert outcome.code == 0, outcome.err
    return folder, outcome.out


def plan_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((run / "placement.yaml").read_text())
    return content


@pytest.mark.slow
def test_the_plan_is_printed_as_a_tree_and_saved(
    placed: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = placed[0] / "runs/demo/latest"
    assert placement.main([str(run)]) == 0
    printed, plan = capsys.readouterr().out, plan_of(run)
    for group in plan["groups"]:
        assert f"\n{group['name']}  (" in f"\n{printed}"
        assert all(f"\n  tensor {tensor['name']} -> " in printed for tensor in group["tensors"])
        assert all(f"\n  layer  {layer}\n" in printed for layer in group["layers"])


@pytest.mark.slow
def test_every_kind_of_rule_reaches_the_plan(placed: tuple[Path, str]) -> None:
    plan = plan_of(placed[0] / "runs/demo/latest")
    groups = {group["name"]: group for group in plan["groups"]}
    assert groups["input.images"]["scale"] == pytest.approx(0.007874)
    assert groups["backbone.stem1.act"]["observer"] == "minmax"
    assert groups["backbone.stem2.act"]["bits"] == 7
    assert plan["concats"]["neck.cat_0"] is False
    quantized = {site["layer"] for site in plan["weights"]}
    assert not any(layer.startswith("head.cls.0.") for layer in quantized)
    assert plan["kept_float"]["head.cls.0.conv1.conv"] == "policy rule head.cls.0.*"
    assert "head.box.0.output" in quantized
    assert "head.box.1.output" in plan["kept_float"]


@pytest.mark.slow
def test_the_decisions_are_those_of_the_saved_plan(placed: tuple[Path, str]) -> None:
    run = placed[0] / "runs/demo/latest"
    decided = json.loads((run / "sharing.json").read_text())["concats"]
    concats = plan_of(run)["concats"]
    assert "neck.cat_0" not in {entry["concat"] for entry in decided}  # a rule had decided it
    assert len(decided) >= 10
    for entry in decided:
        assert entry["shared"] == concats[entry["concat"]] or not entry["shared"]
        assert entry["shared"] or entry["cost"] > 0.1


@pytest.mark.slow
def test_an_edited_plan_is_taken_and_calibrated(placed: tuple[Path, str]) -> None:
    folder, _ = placed
    plan = plan_of(folder / "runs/demo/latest")
    image = next(group for group in plan["groups"] if group["name"] == "input.images")
    image["scale"] = 0.0125
    dropped = plan["weights"].pop()
    plan["kept_float"][dropped["layer"]] = "edited by hand"
    edited = folder / "edited.yaml"
    edited.write_text(yaml.safe_dump(plan, sort_keys=False))
    repairs = ("quant.equalize=true", "quant.greedy_rounding=true", "quant.bias_correction=true")
    outcome = run_entry(
        "train_qat.py",
        *TINY,
        untrained_weights(folder),
        "stages=[calibrate]",
        f"quant.placement={edited}",
        *repairs,
        cwd=folder,
        timeout=550,
    )
    assert outcome.code == 0, outcome.err
    run = folder / "runs/demo/latest"
    assert plan_of(run) == plan
    groups = {group["name"]: group for group in json.loads((run / "calibration.json").read_text())["groups"]}
    assert groups["input.images"]["method"] == "fixed"
    assert groups["input.images"]["scale"] == pytest.approx(0.0125)
    assert groups["backbone.stem1.act"]["method"] == "minmax"
    assert "equalised 0 pairs of layers; 68 left alone" in outcome.err  # SiLU is not homogeneous
    repaired = json.loads((run / "repairs.json").read_text())["layers"]
    assert {entry["layer"] for entry in repaired} == {site["layer"] for site in plan["weights"]}
    rounded = [entry for entry in repaired if entry["error_rounded"] is not None]  # not the grouped ones
    assert len(rounded) > 100
    assert all(entry["error_rounded"] <= entry["error_nearest"] * 1.0001 for entry in rounded)


@pytest.mark.slow
def test_more_than_8_bits_are_refused_with_the_way_out(tmp_path: Path) -> None:
    rule = "quant.policy=[{match: head.box.0.output, bits: 16}]"
    outcome = run_entry(
        "train_qat.py", *TINY, untrained_weights(tmp_path), "stages=[place]", rule, cwd=tmp_path
    )
    assert outcome.code == 2
    assert "quant.policy[0].bits=16" in outcome.err
    assert not (tmp_path / "runs").exists()
