"""Settings of the quant section (placement and calibration of the fake quantizers); a part of `configs.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.setting import setting
from core.choices import ATTENTION, AUTO, CHEAP_ACTIVATIONS, GRIDS, INTEGER, KERNELS, OBSERVERS


@dataclass
class WeightQuantConfig:
    """Quantization of conv and linear weights: per output channel, symmetric."""

    bits: int = setting(8, "Bits; below 8 in simulation only", unit="bits", minimum=2, maximum=8)


@dataclass
class ActivationQuantConfig:
    """Quantization of activations: per tensor, symmetric."""

    bits: int = setting(8, "Bits; below 8 in simulation only", unit="bits", minimum=2, maximum=8)
    unsigned: bool = setting(
        False,
        "Codes 0 to 255 for tensors that are never negative (images, results of ReLU): half the step. CPU engines only",
    )


@dataclass
class PolicyRule:
    """One rule about the quantizers whose name matches; the last matching rule wins."""

    match: str = setting(MISSING, "Name pattern with * and ?, e.g. head.cls.*")
    keep_float: bool | None = setting(None, "true leaves the matching units float, false quantizes them")
    bits: int | None = setting(
        None,
        "Bits of the matching quantizers; for more than 8, keep_float",
        unit="bits",
        minimum=2,
        maximum=8,
    )
    scale: float | None = setting(None, "Fixed scale, e.g. 1/255 for an 8-bit camera image", above=0)
    observer: str | None = setting(None, "Calibration method of the matching quantizers", choices=OBSERVERS)
    share: bool | None = setting(None, "true forces, false forbids one shared scale over a concat")
    grid: str | None = setting(
        None, "Kind of the grid of the matching activations and of the weights that read them", choices=GRIDS
    )


@dataclass
class QuantConfig:
    """Placement and calibration of the fake quantizers."""

    grid: str = setting(
        INTEGER,
        "Codes: integers, or FP8 E4M3 for TensorRT on SM89, SM120 and SM121",
        choices=GRIDS,
    )
    attention: str = setting(
        ATTENTION[0],
        "Matrix products of attention: float leaves them in float, matmul quantizes both operands",
        choices=ATTENTION,
    )
    observer: str = setting("mse", "How a scale is chosen from observed values", choices=OBSERVERS)
    percentile: float = setting(99.99, "For observer=percentile", unit="percent", above=50, maximum=100)
    calibration_images: int = setting(256, "Training images observed, letterboxed", unit="images", minimum=1)
    calibration_batch_size: int = setting(
        8, "Images per calibration step", unit="images", minimum=1, maximum=65536
    )
    imported_ranges: str = setting(
        "use",
        "Ranges in a quantized checkpoint: use makes them the scales, ignore calibrates everything",
        choices=("use", "ignore"),
    )
    share_concat_scales: str = setting(
        "all",
        "One scale for all inputs of a concat: always, never, or if measured to cost no accuracy; policy rules "
        "decide for single concats",
        choices=("all", "measured", "none"),
    )
    share_tolerance: float = setting(
        0.1,
        "For share_concat_scales=measured: relative increase of the output error that a shared scale may cause",
        unit="fraction",
        minimum=0,
    )
    equalize: bool = setting(
        False, "Equalize channel ranges of the layers around a ReLU before quantizing (arXiv:1906.04721)"
    )
    greedy_rounding: bool = setting(
        False,
        "Choose the rounding of each weight, one at a time, by the output error of its layer (the problem of "
        "arXiv:2004.10568)",
    )
    bias_correction: bool = setting(
        False,
        "Correct the mean output of every quantized layer to that of the float layer (arXiv:1906.04721)",
    )
    recalibrate_scores: bool = setting(
        False,
        "Fit an increasing line per class from the quantized model's logits to the float model's on the calibration "
        "images, and fold it into the last layers",
    )
    swap_activation: str | None = setting(
        None,
        "Replace SiLU in the network that is quantized, for a faster engine; the float network keeps SiLU and is the "
        "teacher in the stage finetune; auto measures accuracy and speed and decides (docs/faster.md)",
        choices=(*CHEAP_ACTIVATIONS, AUTO),
    )
    kernel: str = setting(
        KERNELS[0],
        "Fake quantization on a CPU: native is a C file of the package, compiled at first use, torch is torch's "
        "operators, auto is native where there is a C compiler",
        choices=KERNELS,
    )
    weights: WeightQuantConfig = field(default_factory=WeightQuantConfig)
    activations: ActivationQuantConfig = field(default_factory=ActivationQuantConfig)
    edge_bits: int = setting(
        8,
        "Least width of the image, of the layers that read it and of output layers",
        unit="bits",
        minimum=2,
        maximum=8,
    )
    float_patterns: list[str] = setting(
        [], "Name patterns of units to leave float; each must match something"
    )
    policy: list[PolicyRule] = setting([], "Rules in order; see docs/configuration.md")
    placement: str | None = setting(None, "Path of a saved and edited placement to use instead of a new one")
    accuracy_budget: float | None = setting(
        None,
        "AP that calibration may lose: leaves as few groups as possible in float to stay within it (adds the stages "
        "float and sensitivity)",
        unit="AP",
        minimum=0,
        maximum=1,
    )
