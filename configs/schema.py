"""Every setting of Octet: type, meaning, unit and limits.

Hydra checks the YAML files and the command line with these dataclasses (registered by `register_configs`), and the
pipeline receives them. `configs.validation` enforces the limits, and a test compares `docs/configuration.md` with
them, so a setting is described once.

Values have plain types: str, int, float, bool, list and dict. `None` means "decide automatically" or "no limit",
as described for each setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.data_schema import DataConfig
from configs.deploy_schema import DeployConfig
from configs.evaluate_schema import EvaluateConfig, MetricConfig
from configs.quant_schema import QuantConfig
from configs.setting import MAX_SEED, setting
from core.choices import (
    ACTIVATIONS,
    FP8,
    HEADS,
    INT8,
    LAYOUTS,
    PRECISIONS,
    SENSITIVITY_METHODS,
)
from core.families import ARCHITECTURES

MODELS = ("auto", *ARCHITECTURES, "custom")
STAGES = (
    "train",
    "float",
    "place",
    "calibrate",
    "sensitivity",
    "autotune",
    "finetune",
    "export",
    "engine",
    "report",
)


@dataclass
class ModelConfig:
    """The detector."""

    name: str = setting("auto", "Architecture; auto recognizes it by the checkpoint's keys", choices=MODELS)
    activation: str | None = setting(
        None, "Activation of every conv; none uses the checkpoint's, otherwise silu", choices=ACTIVATIONS
    )
    head: str | None = setting(
        None,
        "For networks with two heads, which one is quantized and deployed: one2one needs no NMS; none selects one2one "
        "if the checkpoint has it",
        choices=HEADS,
    )
    num_classes: int | None = setting(
        None, "Number of classes; none reads it from the weights or the data", minimum=1
    )
    factory: str | None = setting(
        None,
        "For model=custom: path/to/file.py:function or package.module:function, from class names to a CustomDetector; "
        "see docs/custom.md",
    )


@dataclass
class AugmentConfig:
    """Training augmentation (heavy); calibration and validation only letterbox."""

    mosaic: float = setting(1.0, "Probability of a four-image mosaic", unit="0..1", minimum=0, maximum=1)
    degrees: float = setting(0.0, "Rotation range, plus or minus", unit="degrees", minimum=0, maximum=180)
    translate: float = setting(
        0.1, "Shift range, plus or minus", unit="fraction of the side", minimum=0, maximum=1
    )
    scale: float = setting(0.5, "Zoom range, 1 plus or minus", unit="factor", minimum=0, maximum=0.95)
    shear: float = setting(0.0, "Shear range, plus or minus", unit="degrees", minimum=0, maximum=45)
    flip: float = setting(0.5, "Probability of a left-right flip", unit="0..1", minimum=0, maximum=1)
    hsv_h: float = setting(0.015, "Hue jitter", unit="fraction of the circle", minimum=0, maximum=1)
    hsv_s: float = setting(0.7, "Saturation jitter", unit="fraction", minimum=0, maximum=1)
    hsv_v: float = setting(0.4, "Brightness jitter", unit="fraction", minimum=0, maximum=1)


MICRO_BATCH = (
    "Images of a step that are in memory at once, per process; their gradients are added up. None is all of them, "
    "until the memory is used up"
)
PRECISION = (
    "Type of the forward and backward pass; auto is bfloat16 (autocast) on a GPU, and on a CPU that multiplies it "
    "itself where measuring shows that it takes a tenth less time, once per machine and network; else float32"
)
LAYOUT = (
    "Memory layout of images and activations; auto measures which is faster, once per machine and network"
)


@dataclass
class TrainConfig:
    """Float training (stage train), from scratch or from weights."""

    epochs: int = setting(100, "Passes over the training split", unit="epochs", minimum=1, maximum=1_000_000)
    batch_size: int = setting(16, "Images per step", unit="images", minimum=1, maximum=65536)
    micro_batch: int | None = setting(
        None,
        MICRO_BATCH,
        unit="images",
        minimum=1,
    )
    learning_rate: float = setting(1e-3, "Peak learning rate (AdamW, cosine)", above=0)
    weight_decay: float = setting(0.05, "AdamW weight decay on conv weights", minimum=0)
    warmup_fraction: float = setting(
        0.05, "Share of steps used for warm-up", unit="0..1", minimum=0, maximum=1
    )
    ema_decay: float = setting(
        0.999, "Decay of the weight average that is evaluated", unit="0..1", minimum=0, maximum=1
    )
    clip_norm: float = setting(10.0, "Largest gradient norm; 0 switches clipping off", minimum=0)
    precision: str = setting(
        "auto",
        PRECISION,
        choices=PRECISIONS,
    )
    layout: str = setting(
        "auto",
        LAYOUT,
        choices=("auto", *LAYOUTS),
    )
    close_mosaic: int = setting(0, "Epochs at the end without mosaic", unit="epochs", minimum=0)


@dataclass
class QatConfig:
    """Quantization-aware fine-tuning (stage finetune)."""

    epochs: int = setting(10, "Passes over the training split", unit="epochs", minimum=1, maximum=1_000_000)
    batch_size: int = setting(16, "Images per step", unit="images", minimum=1, maximum=65536)
    micro_batch: int | None = setting(
        None,
        MICRO_BATCH,
        unit="images",
        minimum=1,
    )
    learning_rate: float = setting(1e-4, "Peak learning rate of the weights (AdamW, cosine)", above=0)
    scale_learning_rate: float = setting(1e-4, "Peak learning rate of the quantizer scales", above=0)
    weight_decay: float = setting(1e-4, "AdamW weight decay on conv weights", minimum=0)
    warmup_fraction: float = setting(
        0.1, "Share of steps used for warm-up", unit="0..1", minimum=0, maximum=1
    )
    ema_decay: float = setting(
        0.99, "Decay of the weight average that is evaluated", unit="0..1", minimum=0, maximum=1
    )
    clip_norm: float = setting(10.0, "Largest gradient norm; 0 switches clipping off", minimum=0)
    task_weight: float = setting(1.0, "Weight of the detection loss", minimum=0)
    both_heads: bool = setting(
        False,
        "For networks with two heads: train the other head, too, in float; the one-to-one head then reads detached "
        "features",
    )
    distill_output: float = setting(1.0, "Weight of output distillation from the float copy", minimum=0)
    distill_features: float = setting(
        0.0,
        "Weight of feature distillation: tensors inside the network compared with those of the float copy",
        minimum=0,
    )
    distill_images: float = setting(
        0.25,
        "Share of the images of each batch that are compared with the float copy, other ones in each step",
        unit="0..1",
        above=0,
        maximum=1,
    )
    distill_feature_names: list[str] = setting(
        [], "Name patterns of the tensors compared, e.g. neck.*; empty selects the inputs of the head"
    )
    oscillation: str = setting(
        "none",
        "Weights that oscillate between two grid points: unchanged, pulled to the centre of their interval, or frozen",
        choices=("none", "dampen", "freeze"),
    )
    dampen_weight: float = setting(
        0.01,
        "For oscillation=dampen: weight of the dampening loss at the end; it increases from 0",
        minimum=0,
    )
    freeze_threshold: float = setting(
        0.03,
        "For oscillation=freeze: frequency of changes that freezes a weight at the end, 4 times as much at the start",
        unit="flips per step",
        above=0,
        maximum=1,
    )
    skip_if_drop_below: float | None = setting(
        None,
        "Skip fine-tuning if the row ptq loses less than this against float; none always fine-tunes",
        unit="AP",
        minimum=0,
        maximum=1,
    )
    patience: int | None = setting(
        None, "Stop after this many epochs without a better validation AP", unit="epochs", minimum=1
    )
    select: str = setting(
        "best",
        "Weights kept: of the epoch that is best on the validation images, or of the last one",
        choices=("best", "last"),
    )
    precision: str = setting(
        "auto",
        PRECISION,
        choices=PRECISIONS,
    )
    layout: str = setting(
        "auto",
        LAYOUT,
        choices=("auto", *LAYOUTS),
    )
    learn_scales: bool = setting(
        True,
        "Learn the scales of activations and weights (LSQ, arXiv:1902.08153); false keeps activation scales and lets "
        "weight scales follow the weights",
    )
    augment: str = setting(
        "light",
        "light: flip and small affine; heavy: the augment section; none: letterbox",
        choices=("none", "light", "heavy"),
    )
    validate_images: int | None = setting(
        None,
        "Validation images per epoch; none uses all, 0 measures at the end only. The final row always uses all",
        unit="images",
        minimum=0,
    )


@dataclass
class SensitivityConfig:
    """Which units lose accuracy when quantized (stage sensitivity)."""

    method: str = setting(
        "fisher",
        "; ".join(f"{name}: {meaning}" for name, meaning in SENSITIVITY_METHODS.items()),
        choices=("none", *SENSITIVITY_METHODS),
    )
    images: int = setting(64, "Images used by the method", unit="images", minimum=1)
    precision: str = setting(
        "auto",
        "Type in which fisher multiplies gradients; the forward pass and all sums are float32. bfloat16 moves "
        "scores by less than 2 %; auto uses it on a CPU that multiplies it itself",
        choices=PRECISIONS,
    )
    directory: str | None = setting(
        None,
        "Folder of the results by unit, which several runs share to divide the work; none: in the run directory",
    )


@dataclass
class AutotuneConfig:
    """Which units to quantize for the best latency (stage autotune)."""

    gpu: str | None = setting(
        None,
        "GPU that latency is estimated for; it need not be present: rtx3060, rtx4060, rtx4090, rtx5090, l4, a10, orin, "
        "or one of gpu_file; none measures layers with the first of deploy.runtimes on this machine",
    )
    gpu_file: str | None = setting(None, "YAML file of GPUs to use instead of deploy/autotune/gpus.yaml")
    precisions: list[str] = setting(
        [INT8, FP8],
        "Quantized precisions that a unit can have; what the GPU or runtime does not run is left out, and without "
        "gpu there is quant.grid alone",
        choices=(INT8, FP8),
    )
    mixtures: int = setting(
        6,
        "Engines with mixed precisions that costs are derived from, for each quantized precision, in addition to those "
        "with one precision",
        unit="engines",
        minimum=0,
    )
    seconds: float = setting(2.0, "For measured costs: how long each engine runs", unit="seconds", above=0)
    confirmed: int = setting(
        3, "Plans of the front that are built and whose AP is measured", unit="plans", minimum=1
    )
    max_ap_loss: float = setting(
        0.005, "AP that the chosen plan may lose against float", unit="AP", minimum=0, maximum=1
    )
    quantize_slower: bool = setting(
        False, "Also quantize units whose kernels are slower quantized than in float, if the AP allows it"
    )


@dataclass
class Config:
    """One run of train_qat.py."""

    experiment: str = setting(MISSING, "Name of the run; set by +experiment=NAME")
    weights: str | None = setting(
        None, "Checkpoint of the float detector; none starts training from random weights"
    )
    run_dir: str | None = setting(None, "Run directory; none creates runs/EXPERIMENT/TIME")
    resume: str = setting(
        "false",
        "Continue the run in run_dir (or the latest one); auto does so if there is one, and starts a run otherwise",
        choices=("false", "true", "auto"),
    )
    checkpoint_minutes: float = setting(
        5.0,
        "Time between saved states of training and fine-tuning; 0 saves one after every step",
        unit="minutes",
        minimum=0,
    )
    trust: bool = setting(
        False, "Run the Python code that a run directory or a --config-dir file names; for files of your own"
    )
    seed: int = setting(0, "Seed of every random choice", minimum=0, maximum=MAX_SEED)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto (a GPU if there is one)")
    threads: int = setting(
        0, "CPU threads of torch; 0 uses all cores", unit="threads", minimum=0, maximum=4096
    )
    stages: list[str] = setting(
        ["float", "calibrate", "finetune", "export", "engine", "report"],
        "Stages to run, in this order",
        choices=STAGES,
    )
    min_ap: float | None = setting(
        None, "Gate: the INT8 result must reach this AP, else exit code 4", unit="AP", minimum=0, maximum=1
    )
    max_ap_drop: float | None = setting(
        None,
        "Gate: the INT8 result may lose this much AP against float, else exit code 4",
        unit="AP",
        minimum=0,
        maximum=1,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    autotune: AutotuneConfig = field(default_factory=AutotuneConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
