"""TensorRT for RTX: building plans without a GPU. The only file that imports `tensorrt_rtx`.

TensorRT for RTX is NVIDIA's compiler for GeForce and RTX GPUs, a product of its own beside TensorRT 8 to 11: its plans
do not run there. It builds ahead of time for named compute capabilities, on machines without a GPU; kernels are
chosen later, on the device. So a build proves what a graph becomes (types, fusions, tensors that are moved), never a
speed. Networks are always strongly typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, TensorProto

from core.choices import CAPABILITIES, FP8_CAPABILITIES
from core.errors import DeployError
from deploy.compile.kernels import Kernel, read_kernels

WITHOUT_INT8_CONVOLUTIONS = frozenset({"SM75"})
SMALLEST_SIZE = 160  # pixels; average-pools of smaller profiles fail in the build


@dataclass(frozen=True)
class Shapes:
    """Shapes of the images [B, 3, H, W] that a plan takes: smallest, the one it is tuned for, largest."""

    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """A plan, and what the compiler says of it.

    Attributes:
        plan: the engine, to be written to a file.
        kernels: its kernels in the order of the log.
        version: version of TensorRT for RTX.
        capabilities: compute capabilities that the plan is for.
    """

    plan: bytes
    kernels: tuple[Kernel, ...]
    version: str
    capabilities: tuple[str, ...]


def import_tensorrt_rtx() -> Any:
    """The tensorrt_rtx module.

    Raises:
        DeployError: it is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise DeployError(
            "TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]' (x86-64 Linux and Windows, no GPU "
            "needed to build)."
        ) from error
    return tensorrt_rtx


def check_capabilities(capabilities: Sequence[str]) -> None:
    """Raise DeployError unless there is at least one capability, and all are known."""
    unknown = [name for name in capabilities if name not in CAPABILITIES]
    if unknown or not capabilities:
        raise DeployError(
            f"Compute capability {unknown[0] if unknown else 'missing'}: expected one of {', '.join(CAPABILITIES)}."
        )


def compile_graph(model: ModelProto, capabilities: Sequence[str], shapes: Shapes | None = None) -> Compiled:
    """Build a graph's plan for some compute capabilities, and read which kernels it has.

    Args:
        model: a graph as TensorRT reads it; the types in it are those of the engine. It is not changed.
        capabilities: names of `core.choices.CAPABILITIES`, at least one. A plan for several has one list of kernels,
            which all of them run: with SM75 among them, no convolution runs in INT8 on any.
        shapes: of the images, for graphs that leave dimensions open.

    Raises:
        DeployError: TensorRT for RTX is missing, or refuses the graph (the message has its words), or a capability
            does not run the graph's FP8 codes.
    """
    check_capabilities(capabilities)
    unable = [name for name in capabilities if name not in FP8_CAPABILITIES]
    if unable and any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer):
        raise DeployError(
            f"The graph has FP8 codes, which {unable[0]} does not run: build for {', '.join(FP8_CAPABILITIES)}, or "
            "export an INT8 graph."
        )
    trt = import_tensorrt_rtx()
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        messages = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise DeployError(f"TensorRT for RTX cannot read the graph: {'; '.join(messages) or 'no message'}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    _add_profile(builder, config, network, shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DeployError(
            f"TensorRT for RTX cannot build the graph for {', '.join(capabilities)}: "
            f"{'; '.join(logger.errors[-3:]) or 'no message'}"
        )
    kernels = tuple(read_kernels(logger.messages))
    return Compiled(bytes(memoryview(plan)), kernels, str(trt.__version__), tuple(capabilities))


def _add_profile(builder: Any, config: Any, network: Any, shapes: Shapes | None) -> None:
    """Give open dimensions of the images their range."""
    images = network.get_input(0)
    if all(size >= 0 for size in images.shape):
        return
    if shapes is None:
        raise DeployError(
            f"The graph leaves dimensions of '{images.name}' open {tuple(images.shape)}: give the image size."
        )
    profile = builder.create_optimization_profile()
    ranges = [
        tuple(wanted if fixed < 0 else fixed for fixed, wanted in zip(images.shape, shape, strict=True))
        for shape in (shapes.smallest, shapes.best, shapes.largest)
    ]
    profile.set_shape(images.name, *ranges)
    config.add_optimization_profile(profile)


def _make_logger(trt: Any) -> Any:
    """A logger that keeps all messages, and errors apart."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Logger()
