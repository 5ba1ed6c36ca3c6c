"""Names of methods that the configuration offers and other packages implement.

To add one, add its name here and its implementation there; a test compares both.
"""

from __future__ import annotations

INTEGER, FP8 = "integer", "fp8"
GRIDS = (INTEGER, FP8)  # core.grid
INT8 = "int8"
QUANTIZED = (INT8, FP8, "int8-fp8")  # precisions of quantized graphs and engines; the last has codes of both
OBSERVERS = ("minmax", "percentile", "mse", "entropy")  # quant.calibration.observers
ATTENTION = (
    "float",
    "matmul",
)  # quant.placement.placer: what is quantized of attention in addition to convolutions
SENSITIVITY_METHODS = {  # quant.sensitivity and the stage
    "fisher": "one backward pass (arXiv:2210.08502)",
    "sqnr": "output error",
    "map": "AP of each unit",
}
SILU = "silu"
ACTIVATIONS = (SILU, "relu")  # models.blocks
BFLOAT16, FLOAT32 = "bfloat16", "float32"
PRECISIONS = ("auto", FLOAT32, BFLOAT16)  # training.loop, quant.sensitivity
CONTIGUOUS, CHANNELS_LAST = LAYOUTS = ("contiguous", "channels_last")  # training.layout
CHEAP_ACTIVATIONS = ("relu", "hardswish")  # models.swapping: what can replace SiLU
ONE2MANY, ONE2ONE = "one2many", "one2one"
HEADS = (ONE2ONE, ONE2MANY)  # models.dual_heads
CAPABILITIES = (
    "SM75",
    "SM80",
    "SM86",
    "SM89",
    "SM120",
    "SM121",
)  # deploy.compile: GPUs that TensorRT for RTX builds for
FP8_CAPABILITIES = ("SM89", "SM120", "SM121")  # those that run FP8
DEFAULT_CAPABILITIES = (
    "SM86",
    "SM89",
    "SM120",
)  # GeForce RTX 30, 40 and 50; without any the library asks for a GPU
TORCH = "torch"  # pipeline.prediction: the run's network itself, where an engine's runtime could be named
AUTO, NATIVE = "auto", "native"
KERNELS = (AUTO, NATIVE, TORCH)  # quant.native: forms of fake quantization on CPUs
DANGLING_LINKS = ("error", "skip")  # data.dataset
BY_NAME, BY_ORDER = CLASS_MAPS = ("names", "order")  # pipeline.class_names
