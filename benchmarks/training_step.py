"""Times a step of fine-tuning and an evaluation compared with the float network, and measures the memory of training.

Usage:
    python benchmarks/training_step.py [--weights W] [--size 320] [--batch 8] [--rounds 9] [--threads 1]
        [--only WORK,...] [--json FILE]

A step is forward and backward with the mean of the squared outputs as the loss. All works run in one process, one after
the other in each round, and a ratio is taken within a round: it is the median over the rounds, with the smallest and
largest as well. Time is processor time of the process on a CPU, so that other work on the machine counts little, and
wall time on a GPU.

Peers take the places of our quantizers in the same graph: the `TensorQuantizer` of pytorch-quantization and of modelopt
(both with fixed ranges), `torch.ao`'s `FakeQuantize` with its observer off, and torch's learnable fake-quantize
operator. A peer that is not installed is skipped.

Memory is what training adds to a process that has the network and torch loaded (the peak of the resident size), for
float training and for fine-tuning with a teacher, each in a separate process.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.schema import QatConfig
from core.grid import Grid
from models import Detector, build_detector, detector_loss, fold_detector, load_detector
from quant import (
    FakeQuantize,
    FineTuningOptions,
    QuantizationAware,
    WeightFakeQuantize,
    calibrate,
    insert,
    place,
    quantized_layers,
)
from quant.finetuning.distillation import flatten_maps
from training import TrainingOptions, TrainingState, train_epochs

FLOAT = "float step"
EVALUATION = "float evaluation"
MEMORY_STEPS = 3
Work = Callable[[], object]


class LearnableOperator(nn.Module):
    """torch's own learnable fake quantization, instead of one of our quantizers."""

    def __init__(self, scale: Tensor, grid: Grid, axis: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().reshape(-1).clone())
        self.zero_point = nn.Parameter(torch.zeros_like(self.scale))
        self.grid, self.axis = grid, axis

    def forward(self, x: Tensor) -> Tensor:
        """X on the grid."""
        low, high = self.grid.low, self.grid.high
        if self.axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(
                x, self.scale, self.zero_point, low, high, 1.0
            )
        return torch._fake_quantize_learnable_per_channel_affine(
            x, self.scale, self.zero_point, self.axis, low, high, 1.0
        )


def torch_ao(scale: Tensor, grid: Grid, axis: int | None) -> nn.Module:
    """`torch.ao`'s fake quantizer with fixed parameters."""
    from torch.ao.quantization import FakeQuantize as Peer
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    observer = MovingAverageMinMaxObserver if axis is None else MovingAveragePerChannelMinMaxObserver
    scheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
    options = {} if axis is None else {"ch_axis": axis}
    peer = Peer(observer, grid.low, grid.high, dtype=torch.qint8, qscheme=scheme, **options)
    peer.scale = scale.detach().reshape(-1).clone()
    peer.zero_point = torch.zeros(scale.numel(), dtype=torch.int32)
    peer.disable_observer()
    return peer


def pytorch_quantization(scale: Tensor, grid: Grid, axis: int | None) -> nn.Module:
    """NVIDIA's quantizer with a fixed range."""
    from pytorch_quantization.nn import TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor

    peer = TensorQuantizer(QuantDescriptor(num_bits=grid.bits, axis=axis))
    peer.register_buffer("_amax", largest(scale, grid, axis))
    return peer


def modelopt(scale: Tensor, grid: Grid, axis: int | None) -> nn.Module:
    """The quantizer of NVIDIA's modelopt with a fixed range."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    peer: nn.Module = TensorQuantizer(QuantizerAttributeConfig(num_bits=grid.bits, axis=axis))
    peer.amax = largest(scale, grid, axis)
    return peer


def largest(scale: Tensor, grid: Grid, axis: int | None) -> Tensor:
    """The largest value of a grid; for one scale per channel [C, 1, 1, 1], with C at the place of `axis`."""
    amax = scale.detach() * grid.high
    return amax if axis is None else amax.reshape([-1 if d == axis else 1 for d in range(4)])


PEERS: dict[str, Callable[[Tensor, Grid, int | None], nn.Module]] = {
    "pytorch-quantization": pytorch_quantization,
    "modelopt": modelopt,
    "torch.ao": torch_ao,
    "torch's learnable operator": LearnableOperator,
}


class PeerConv(nn.Conv2d):
    """A convolution whose weight passes a peer's quantizer."""

    peer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the quantized weight."""
        return self._conv_forward(input, self.peer(self.weight), self.bias)


def with_peer(model: fx.GraphModule, make: Callable[[Tensor, Grid, int | None], nn.Module]) -> fx.GraphModule:
    """A copy of a calibrated model with every quantizer replaced."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantize):
            model.set_submodule(name, make(module.scale, module.grid, None))
    for layer in quantized_layers(model).values():
        quantizer: WeightFakeQuantize = layer.weight_quantizer
        del layer.weight_quantizer
        object.__setattr__(layer, "__class__", PeerConv)
        layer.add_module("peer", make(quantizer.scale, quantizer.grid, quantizer.axis))
    model.recompile()  # the generated code calls our quantizers
    return model


def detector_of(weights: Path | None) -> Detector:
    """The folded float detector: a checkpoint, or YOLOv9-t with random weights."""
    detector = build_detector("yolov9t", 3) if weights is None else load_detector(weights)
    return fold_detector(detector)


def step(network: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Work:
    """Forward and backward of a network; its gradients are dropped before."""
    network = network.train()

    def work() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype) if dtype else nullcontext():
            outputs = flatten_maps(network(images))
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()

    return work


def evaluation(network: nn.Module, images: Tensor) -> Work:
    """Forward without gradients."""
    network = network.eval()

    def work() -> None:
        with torch.inference_mode():
            network(images)

    return work


def in_channels_last(what: Any) -> Any:
    """A tensor or module in the layout channels-last."""
    return what.to(memory_format=torch.channels_last)


def works(detector: Detector, images: Tensor, only: list[str]) -> dict[str, Work]:
    """What is timed, by name; the float step and the float evaluation come first."""
    network = detector.network.eval()
    model = insert(network, place(network))
    calibrate(model, [images])
    images_last, float_last = in_channels_last(images), in_channels_last(copy.deepcopy(network))
    found: dict[str, Work] = {
        FLOAT: step(copy.deepcopy(network), images),
        "float step, channels-last": step(float_last, images_last),
        "float step, channels-last, bfloat16": step(float_last, images_last, torch.bfloat16),
        "QAT step": step(copy.deepcopy(model), images),
        "QAT step, channels-last": step(in_channels_last(copy.deepcopy(model)), images_last),
        "QAT step, bfloat16": step(copy.deepcopy(model), images, torch.bfloat16),
        "QAT step, channels-last, bfloat16": step(
            in_channels_last(copy.deepcopy(model)), images_last, torch.bfloat16
        ),
    }
    for name, make in PEERS.items():
        try:
            found[name] = step(with_peer(model, make), images)
        except ImportError as error:
            print(f"skipped {name}: {error}")
    found |= {
        EVALUATION: evaluation(copy.deepcopy(network), images),
        "float evaluation, channels-last": evaluation(copy.deepcopy(float_last), images_last),
        "quantized evaluation": evaluation(copy.deepcopy(model), images),
        "quantized evaluation, channels-last": evaluation(
            in_channels_last(copy.deepcopy(model)), images_last
        ),
    }
    return {
        name: work
        for name, work in found.items()
        if name in (FLOAT, EVALUATION) or not only or any(part in name for part in only)
    }


def interleaved(named: dict[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every work in every round, after one round that warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in named}
    for number in range(rounds + 1):
        for name, work in named.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                taken[name].append(clock() - start)
    return taken


def ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and largest ratio to the float work of the same round, and the median of the seconds."""
    table = {}
    for name, seconds in taken.items():
        reference = taken[EVALUATION if "evaluation" in name else FLOAT]
        table[name] = compared(seconds, reference)
    return table


def compared(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median of the seconds; median, least and largest ratio to the reference of the same round."""
    relative = sorted(own / other for own, other in zip(seconds, reference, strict=True))
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(relative),
        "least": relative[0],
        "largest": relative[-1],
    }


def teacher_share(
    detector: Detector, images: Tensor, rounds: int, share: float, form: str = "", **options: Any
) -> dict[str, dict[str, float]]:
    """Time of distillation (the teacher's forward and the loss) as a share of the whole fine-tuning step."""
    network = detector.network.eval()
    model = insert(network, place(network))
    calibrate(model, [images])
    loops = {}
    for name, weight in (("without a teacher", 0.0), ("fine-tuning step", 1.0)):
        added = FineTuningOptions(distill_weight=weight, distill_images=share)
        extension = QuantizationAware(copy.deepcopy(model), added, copy.deepcopy(network))
        loops[name] = training(detector, extension.model, extension, images, rounds + 1, **options)
    taken = interleaved({name: partial(next, loop) for name, loop in loops.items()}, rounds, images.device)
    shares = sorted(1 - without / whole for without, whole in zip(*taken.values(), strict=True))
    return {
        "teacher's share of a fine-tuning step" + form: {
            "seconds": statistics.median(taken["fine-tuning step"]),
            "ratio": statistics.median(shares),
            "least": shares[0],
            "largest": shares[-1],
        }
    }


def training(
    detector: Detector, network: nn.Module, extension: Any, images: Tensor, steps: int, **options: Any
) -> Any:
    """The training loop on made-up targets, an epoch of one step at a time."""
    boxes = torch.tensor([[40.0, 40.0, 140.0, 120.0], [100.0, 150.0, 200.0, 260.0]]) * images.shape[-1] / 320
    rows = [
        torch.cat([torch.tensor([[float(i)]] * 2), torch.tensor([[0.0], [1.0]]), boxes], 1)
        for i in range(len(images))
    ]
    batch = (images, torch.cat(rows))
    state = TrainingState(network, TrainingOptions(steps, learning_rate=1e-6, **options), extension)
    return train_epochs(state, lambda epoch, done: [batch], 1, detector_loss(detector))


def memory_of(kind: str, options: argparse.Namespace) -> None:
    """Train in this process and print by how many MB its peak has risen."""
    detector = detector_of(options.weights)
    images = torch.rand(options.memory_batch, 3, options.size, options.size)
    network, extension = detector.network, None
    if kind == "fine-tuning":
        network = insert(detector.network, place(detector.network))
        calibrate(network, [images[:2]])
        added = FineTuningOptions(distill_images=options.distill_images)
        extension = QuantizationAware(network, added, copy.deepcopy(detector.network))
    for _ in training(detector, network, extension, images, MEMORY_STEPS):
        pass
    peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    print(peak.group(1) if peak else math.nan)


def memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak of fine-tuning relative to that of float training, each in a separate process."""
    peaks = {}
    for kind in ("float training", "fine-tuning"):
        command = [sys.executable, __file__, "--memory-of", kind, "--size", str(options.size)]
        command += ["--threads", str(options.threads), "--memory-batch", str(options.memory_batch)]
        command += ["--distill-images", str(options.distill_images)]
        command += [] if options.weights is None else ["--weights", str(options.weights)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        peaks[kind] = float(lines[-1]) / 1024
    print(f"peak of the process: {', '.join(f'{kind} {peak:.0f} MB' for kind, peak in peaks.items())}")
    ratio = peaks["fine-tuning"] / peaks["float training"]
    return {"memory of fine-tuning": {"seconds": math.nan, "ratio": ratio, "least": ratio, "largest": ratio}}


def main() -> None:
    """Print one line per work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="checkpoint; default: YOLOv9-t with random weights")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--only", default="", help="parts of names, separated by commas; also teacher, memory"
    )
    parser.add_argument(
        "--distill-images",
        type=float,
        default=QatConfig().distill_images,
        help="share of the images that the teacher sees (default: that of qat.distill_images)",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        memory_of(options.memory_of, options)
        return
    only = [part for part in options.only.split(",") if part]
    detector = detector_of(options.weights).to(options.device)
    images = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
    table = ratios(interleaved(works(detector, images, only), options.rounds, images.device))
    if not only or "teacher" in only:
        share = options.distill_images
        table |= teacher_share(detector, images, options.rounds, share)
        form = ", channels-last, bfloat16"
        table |= teacher_share(
            detector, images, options.rounds, share, form, channels_last=True, autocast=True
        )
    if images.device.type == "cpu" and (not only or "memory" in only):
        table |= memory(options)
    for name, row in table.items():
        print(
            f"{name:<40} {row['seconds']:7.3f} s   {row['ratio']:.2f} ({row['least']:.2f} to {row['largest']:.2f})"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
