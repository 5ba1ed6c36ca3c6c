"""Memory layouts and precisions of training and inference: as set, or measured once per machine and network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import QatConfig, TrainConfig
from core.choices import AUTO, BFLOAT16, CHANNELS_LAST, FLOAT32
from core.errors import WriteError
from core.files import write_json
from core.machine import computes_in_bfloat16, describe_machine
from pipeline.job import Job
from pipeline.networks import INFERENCE_LAYOUT
from pipeline.run.progress import say
from training.layout import faster_layout, faster_precision, measure_layouts

REMEMBERED = "layouts.json"  # in data.cache_dir
INFERENCE = "evaluation"
MEASURED_IMAGES = 4


@dataclass(frozen=True)
class Form:
    """What a stage trains in: channels-last or contiguous, under autocast to bfloat16 or in float32."""

    channels_last: bool
    autocast: bool


def layout_file(stage: str) -> str:
    """Name in the run directory of what a stage trained in, for resumed runs."""
    return f"{stage}-layout.json"


def training_form(job: Job, config: TrainConfig | QatConfig, network: nn.Module, stage: str) -> Form:
    """What a stage trains in; says so where it is measured, and keeps the choice in the run directory."""
    kept = _read(job.run.path(layout_file(stage)))
    layout, precision = kept.get("layout", config.layout), kept.get("precision", config.precision)
    precisions = _precisions(precision, job.device)
    if layout == AUTO or len(precisions) > 1:
        images = min(config.batch_size, config.micro_batch or config.batch_size)
        seconds = {name: _seconds(job, network, stage, images, name == BFLOAT16) for name in precisions}
        layouts = {
            name: faster_layout(found) if layout == AUTO else layout for name, found in seconds.items()
        }
        if len(precisions) > 1:
            precisions = [faster_precision(*(seconds[name][layouts[name]] for name in precisions))]
        layout = layouts[precisions[0]]
    (precision,) = precisions
    job.run.write_json(layout_file(stage), {"layout": layout, "precision": precision})
    say(f"{stage}: trains in {layout}, {precision}")
    return Form(layout == CHANNELS_LAST, precision == BFLOAT16)


def _precisions(wanted: str, device: torch.device) -> list[str]:
    """Those that a stage may train in on a device: float32 before bfloat16 where measuring has to choose."""
    if wanted != AUTO:
        return [wanted]
    if device.type == "cuda":
        return [BFLOAT16]
    return [FLOAT32, BFLOAT16] if device.type == "cpu" and computes_in_bfloat16() else [FLOAT32]


def keep_inference_layout(job: Job) -> None:
    """Where it is to be measured, keep in the run directory which layout the float network is evaluated in."""
    if job.config.evaluate.layout == "auto":
        network = job.networks.detector.network
        seconds = _seconds(job, network, INFERENCE, job.config.evaluate.batch_size, backward=False)
        layout = faster_layout(seconds)
        say(f"{INFERENCE}: layout {layout}")
        job.run.write_json(INFERENCE_LAYOUT, {"layout": layout})


def _seconds(
    job: Job, network: nn.Module, use: str, batch_size: int, autocast: bool = False, backward: bool = True
) -> dict[str, float]:
    """Seconds by layout, measured or remembered."""
    folder = job.config.data.cache_dir
    file = None if folder is None else Path(folder) / REMEMBERED
    batch = min(batch_size, MEASURED_IMAGES)
    size = job.splits.config.input_size
    key = _key(network, job.device, (size.height, size.width, batch, autocast, use))
    remembered = {} if file is None else _read(file)
    if key not in remembered:
        images = torch.rand(batch, 3, size.height, size.width, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng([]):
            seconds = measure_layouts(network, images.to(job.device), autocast, backward=backward)
        remembered[key] = {"seconds": seconds}
        _remember(file, remembered)
    found: dict[str, float] = remembered[key]["seconds"]
    times = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in found.items())
    passes = "forward and backward" if backward else "forward"
    say(f"{use}: {passes} of {batch} images in {BFLOAT16 if autocast else FLOAT32}: {times}")
    return found


def _key(network: nn.Module, device: torch.device, rest: tuple[object, ...]) -> str:
    """Hash of all that the choice depends on: machine, device, threads, versions, network, sizes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()["processor"]
    shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
    parts = (name, torch.get_num_threads(), torch.__version__, type(network).__name__, shapes, rest)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, Any]:
    """What a file remembers; nothing where it is absent or damaged, and then it is measured again."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(file: Path | None, content: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except (OSError, WriteError) as error:
        say(f"warning: the measured layout could not be saved: {error}")
