"""The memory layouts of training and inference: as set, or measured once per machine and network and remembered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import QatConfig, TrainConfig
from core.choices import BFLOAT16, CHANNELS_LAST
from core.errors import WriteError
from core.files import write_json
from core.machine import describe_machine
from pipeline.job import Job
from pipeline.networks import INFERENCE_LAYOUT
from pipeline.run.progress import say
from training.layout import faster_layout, measure_layouts

REMEMBERED = "layouts.json"  # in data.cache_dir
INFERENCE = "evaluation"
MEASURED_IMAGES = 4


def layout_file(stage: str) -> str:
    """Name in the run directory of what a stage trained in, for resumed runs."""
    return f"{stage}-layout.json"


def uses_autocast(config: TrainConfig | QatConfig, device: torch.device) -> bool:
    """Whether a section trains under autocast to bfloat16 on a device."""
    return config.precision == BFLOAT16 or (config.precision == "auto" and device.type == "cuda")


def in_channels_last(job: Job, config: TrainConfig | QatConfig, network: nn.Module, stage: str) -> bool:
    """Whether a stage trains in channels-last; says so, and keeps the choice in the run directory."""
    kept = _read(job.run.path(layout_file(stage))).get("layout")
    if kept is None:
        kept = config.layout
        if kept == "auto":
            size = min(config.batch_size, config.micro_batch or config.batch_size)
            kept = _measured(job, network, stage, size, uses_autocast(config, job.device))
        job.run.write_json(layout_file(stage), {"layout": kept})
    return bool(kept == CHANNELS_LAST)


def keep_inference_layout(job: Job) -> None:
    """Where it is to be measured, keep in the run directory which layout the float network is evaluated in."""
    if job.config.evaluate.layout == "auto":
        network = job.networks.detector.network
        layout = _measured(job, network, INFERENCE, job.config.evaluate.batch_size, backward=False)
        job.run.write_json(INFERENCE_LAYOUT, {"layout": layout})


def _measured(
    job: Job, network: nn.Module, use: str, batch_size: int, autocast: bool = False, backward: bool = True
) -> str:
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
        remembered[key] = {"layout": faster_layout(seconds), "seconds": seconds}
        _remember(file, remembered)
    found = remembered[key]
    times = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in found["seconds"].items())
    passes = "forward and backward" if backward else "forward"
    say(f"{use}: layout {found['layout']} ({passes} of {batch} images: {times})")
    return str(found["layout"])


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
