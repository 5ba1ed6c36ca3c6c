"""The option `quant.recalibrate_scores`: class scores of a quantized model brought back to those of the float one."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from core.errors import ConfigError
from core.rows import RowKey
from models import Decode, Detector
from pipeline.job import Job
from pipeline.run.progress import say
from pipeline.stages.calibration import calibration_images
from quant import ScoreLine, fold_lines, recalibrate_scores, trace

SETTING = "quant.recalibrate_scores"


def recalibrate(job: Job, model: fx.GraphModule, key: RowKey) -> None:
    """Fit a line per class on the calibration images and fold it into the model, if the settings ask for that.

    The figures are kept as `recalibration-<row>.json`.
    """
    if not job.config.quant.recalibrate_scores:
        return
    detector = job.networks.detector
    layers = class_layers(model, detector)
    images = calibration_images(job, job.config.quant.calibration_images)
    lowest = job.config.evaluate.operating_confidence
    lines = recalibrate_scores(model.eval(), detector.network, images, layers, lowest)
    content = {name: vars(line) for name, line in zip(detector.names, lines, strict=True)}
    job.run.write_json(recalibration_file(key), {"layers": layers, "classes": content})
    shown = [line for line in lines if line.error_before is not None and line.error_after is not None]
    if shown:
        before, after = (
            max(getattr(line, name) for line in shown) for name in ("error_before", "error_after")
        )
        say(f"recalibration {key.name}: largest score error of a class {before:.4f} -> {after:.4f}")


def take_back(job: Job, model: fx.GraphModule, key: RowKey) -> None:
    """Undo `recalibrate` in a model of this run that was kept with its lines, so that it can be trained.

    The lines fit the scores that users see. Far below, they move logits that distillation compares as well.
    """
    if not job.config.quant.recalibrate_scores:
        return
    content = job.run.read_json(recalibration_file(key))
    lines = [ScoreLine(**line).inverse for line in content["classes"].values()]
    for name in content["layers"]:
        fold_lines(model.get_submodule(name), lines)


def recalibration_file(key: RowKey) -> str:
    """Name of the artifact with the lines of a row's model."""
    return f"recalibration-{key.name}.json"


def check_recalibration(detector: Detector) -> None:
    """Find out before any long work whether the class scores come straight out of layers of the network.

    Raises:
        ConfigError: they do not, or the network's decode is the user's own.
    """
    if not isinstance(detector.decode, Decode):
        raise ConfigError(
            f"{SETTING}=true with a decode of your own: which maps are class logits is not known; use {SETTING}=false, "
            "or give model.factory's CustomDetector no decode"
        )
    class_layers(trace(copy.deepcopy(detector.network).eval()), detector)


def class_layers(model: fx.GraphModule, detector: Detector) -> list[str]:
    """Names of the layers that give the class logits of the deployed head, one per level.

    Raises:
        ConfigError: they are not convolutions or linear layers with a bias, or give something other than the logits.
    """
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    maps: Any = output.args[0]
    if isinstance(maps, dict):  # both heads of a network before one is chosen
        maps = maps[detector.deployed_head]
    if isinstance(maps[-1], fx.Node):  # segmentation: the levels, then the prototypes
        maps = maps[0]
    names = []
    for _, scores, *_ in maps:
        layer = model.get_submodule(str(scores.target)) if scores.op == "call_module" else None
        bias = getattr(layer, "bias", None)
        if not isinstance(layer, nn.Conv2d | nn.Linear) or bias is None or len(bias) != detector.num_classes:
            raise ConfigError(
                f"{SETTING}=true: the class logits come from {scores.name}, not from a convolution of "
                f"{detector.num_classes} channels with a bias; use {SETTING}=false"
            )
        names.append(str(scores.target))
    return names
