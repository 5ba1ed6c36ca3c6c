"""ONNX file -> TensorRT engine, for TensorRT 8.6, 10 and 11.

Next to the engine NAME.engine is NAME.engine.json: TensorRT version, GPU, hashes and options. An engine runs only
on the version and GPU it was built with; the runtime compares before it loads.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.choices import INT8, QUANTIZED
from core.errors import DeployError
from core.files import write_bytes, write_json
from core.runtimes import PRECISION_NAMES
from core.targets import TARGETS
from deploy.graph.model import load_onnx, opset_of, save_onnx, stored_metadata, verify_onnx
from deploy.graph.passes import count_qdq, run_pass
from deploy.graph.quantizers import quantized_precision
from deploy.runtimes.base import EngineRequest
from deploy.runtimes.tensorrt_api import VersionRules, import_tensorrt, make_logger, rules_of
from deploy.targets.typed import strongly_typed

LOGGER = logging.getLogger(__name__)
PRECISIONS = (*reversed(QUANTIZED), "fp16", "fp32")


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        precision: of `PRECISIONS`: "fp16", "fp32", or the codes of a Q/DQ graph (FP16 for the rest); None takes the
            codes that the file has. In a strongly typed build the file's types count.
        strongly_typed: None takes it from the file: exports for trt11 are.
        min_batch, best_batch, max_batch: batch sizes of the optimization profile, where the file leaves the batch
            open.
        min_size, best_size, max_size: (height, width) where the file leaves them open.
        workspace_bytes: memory the builder may try kernels with.
        timing_cache: file with kernel timings, read if it is there and written back; makes later builds fast.
        optimization_level: 0 to 5, None for TensorRT's default.
    """

    precision: str | None = None
    strongly_typed: bool | None = None
    min_batch: int = 1
    best_batch: int = 1
    max_batch: int = 16
    min_size: tuple[int, int] = (320, 320)
    best_size: tuple[int, int] = (640, 640)
    max_size: tuple[int, int] = (1280, 1280)
    workspace_bytes: int = 4 << 30
    timing_cache: Path | None = None
    optimization_level: int | None = None

    @classmethod
    def of(cls, request: EngineRequest) -> BuildOptions:
        """Options for what is asked of any runtime: one batch and one size where they are named."""
        wanted = request.precision
        options: dict[str, Any] = {"precision": PRECISION_NAMES.get(wanted, wanted) if wanted else None}
        if request.batch is not None:
            options |= {"best_batch": request.batch, "max_batch": request.batch}
        if request.image_size is not None:
            options |= dict.fromkeys(("min_size", "best_size", "max_size"), request.image_size)
        if request.cache is not None:
            options["timing_cache"] = request.cache / "timing.cache"
        return cls(**options)


@dataclass(frozen=True)
class GraphFacts:
    """What the builder needs to know of the ONNX file; `codes` is its `quantized_precision`."""

    target: str
    opset: int
    codes: str | None
    metadata: dict[str, str]
    sha256: str

    @property
    def is_quantized(self) -> bool:
        """Whether there are Q or DQ nodes."""
        return self.codes is not None


def build_tensorrt(onnx_path: Path, out_dir: Path, options: BuildOptions, trt: Any = None) -> Path:
    """Build OUT_DIR/NAME.engine and its sidecar; returns the engine's path.

    A version without an FP16 flag gets an FP16 graph for precision "fp16", see `write_half`.

    Args:
        onnx_path: file exported for trt10 or trt11, or any other that TensorRT reads.
        out_dir: folder for the engine.
        options: see `BuildOptions`.
        trt: the tensorrt module, given by tests; imported when None.

    Raises:
        DeployError: TensorRT missing or too old, options it cannot meet, or its own refusal with its messages.
    """
    trt = import_tensorrt() if trt is None else trt
    rules = rules_of(trt.__version__)
    if options.precision == "fp16" and rules.always_strongly_typed:
        onnx_path = write_half(onnx_path, out_dir / "fp16" / onnx_path.name)
    facts = read_facts(onnx_path)
    is_typed = decide_typing(rules, facts, options, trt.__version__)
    start = time.perf_counter()
    logger = make_logger(trt)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, rules, is_typed))
    parse_onnx(trt, network, logger, onnx_path)
    config = make_config(trt, builder, rules, options, facts, is_typed)
    add_profile(builder, config, network, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DeployError(f"TensorRT {trt.__version__} cannot build {onnx_path}: {_last(logger.errors)}")
    content = bytes(memoryview(plan))
    if options.timing_cache is not None:
        write_bytes(options.timing_cache, bytes(memoryview(config.get_timing_cache().serialize())))
    path = out_dir / f"{onnx_path.stem}.engine"
    write_bytes(path, content)
    sidecar = {
        "tensorrt": trt.__version__,
        "gpu": gpu_name(),
        "engine_sha256": hashlib.sha256(content).hexdigest(),
        "onnx": onnx_path.name,
        "onnx_sha256": facts.sha256,
        "precision": facts.codes or options.precision,
        "strongly_typed": is_typed,
        "options": {
            **asdict(options),
            "timing_cache": str(options.timing_cache) if options.timing_cache else None,
        },
        "metadata": facts.metadata,
        "build_seconds": time.perf_counter() - start,
    }
    write_json(sidecar_path(path), sidecar)
    return path


def write_half(source: Path, destination: Path) -> Path:
    """Write a float graph in FP16 with an FP32 decode, for TensorRT versions without an FP16 flag.

    Raises:
        DeployError: the graph is quantized; such graphs are exported for trt11.
    """
    model = load_onnx(source)
    if any(count_qdq(model)):
        raise DeployError(f"{source} is quantized; export it with target=trt11 instead of --precision fp16.")
    run_pass(model, strongly_typed("fp16"))
    for entry in model.metadata_props:
        if entry.key == "octet.target":
            entry.value = "trt11"
    save_onnx(model, destination)
    return destination


def sidecar_path(engine: Path) -> Path:
    """Where an engine's JSON lies."""
    return engine.with_name(f"{engine.name}.json")


def gpu_name() -> str:
    """Name and compute capability of the current GPU; "none" without one."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"


def read_facts(onnx_path: Path) -> GraphFacts:
    """Target, opset, Q/DQ and metadata of a file, which is checked as untrusted data in between."""
    verify_onnx(onnx_path)
    model = load_onnx(onnx_path)
    metadata = stored_metadata(model)
    digest = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
    target = metadata.get("octet.target", "")
    return GraphFacts(target, opset_of(model), quantized_precision(model), metadata, digest)


def decide_typing(rules: VersionRules, facts: GraphFacts, options: BuildOptions, version: str) -> bool:
    """Whether the network is strongly typed; raises DeployError where graph, options and version do not fit."""
    if options.precision not in (None, *PRECISIONS):
        raise DeployError(
            f"Unknown precision '{options.precision}'; expected one of {', '.join(PRECISIONS)}."
        )
    check_codes(facts, options.precision, "trt11" if rules.always_strongly_typed else "trt10")
    if facts.opset > rules.max_opset:
        raise DeployError(
            f"TensorRT {version} reads opset {rules.max_opset} at most, the graph has {facts.opset}."
        )
    wanted = options.strongly_typed
    if wanted is None:
        wanted = rules.always_strongly_typed or (rules.can_be_strongly_typed and facts.target == "trt11")
    if wanted and not rules.can_be_strongly_typed:
        raise DeployError(f"TensorRT {version} has no strongly typed networks; export with target=trt10.")
    if not wanted and rules.always_strongly_typed:
        raise DeployError(
            f"TensorRT {version} builds strongly typed networks only; export with target=trt11."
        )
    if wanted and facts.target == "trt10":
        LOGGER.warning(
            "Strongly typed build of a graph whose float part is FP32: it will run in FP32. Use trt11."
        )
    return wanted


def check_codes(facts: GraphFacts, precision: str | None, target: str) -> None:
    """Raise DeployError for unsigned codes, and for a precision that is not that of the graph's codes.

    `target` is the one to export for.
    """
    if facts.is_quantized and facts.target in TARGETS and not TARGETS[facts.target].signed_only:
        raise DeployError(
            f"This graph was exported for {facts.target} (unsigned activations), which TensorRT does not take; export "
            f"it with target={target}."
        )
    if precision in (None, *QUANTIZED) and not facts.is_quantized:
        raise DeployError(
            f"precision={precision or INT8} needs a graph with Q/DQ; this one has none. Export a quantized model."
        )
    if precision in QUANTIZED and precision != facts.codes:
        raise DeployError(
            f"precision={precision}, but the graph's codes are {facts.codes}: leave precision out."
        )


def network_flags(trt: Any, rules: VersionRules, is_typed: bool) -> int:
    """Flags for `create_network`: a flag is named only where the version knows it."""
    flags = 0
    if rules.explicit_batch_flag:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if is_typed and not rules.always_strongly_typed:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def parse_onnx(trt: Any, network: Any, logger: Any, onnx_path: Path) -> None:
    """Read the file into the network; raises DeployError with every message of the parser."""
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_path.read_bytes(), str(onnx_path)):
        messages = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise DeployError(
            f"TensorRT {trt.__version__} cannot read {onnx_path}: {'; '.join(messages) or 'no message'}"
        )


def make_config(
    trt: Any, builder: Any, rules: VersionRules, options: BuildOptions, facts: GraphFacts, is_typed: bool
) -> Any:
    """Builder configuration; precision flags only where they exist and the network is not typed."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if rules.precision_flags and not is_typed:
        if facts.is_quantized:
            config.set_flag(trt.BuilderFlag.INT8)
        if options.precision != "fp32":
            config.set_flag(trt.BuilderFlag.FP16)
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def add_profile(builder: Any, config: Any, network: Any, options: BuildOptions) -> None:
    """One optimization profile for every input with open dimensions."""
    profile, is_needed = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        is_needed = True
        profile.set_shape(tensor.name, *profile_range(tensor.name, shape, options))
    if is_needed:
        config.add_optimization_profile(profile)


def profile_range(name: str, shape: Sequence[int], options: BuildOptions) -> tuple[tuple[int, ...], ...]:
    """Smallest, best and largest shape of an input whose open dimensions are -1.

    Raises:
        DeployError: it is not a batch of images, or the sizes are not in order.
    """
    low, best, high = (
        fill_shape(shape, batch, size)
        for batch, size in (
            (options.min_batch, options.min_size),
            (options.best_batch, options.best_size),
            (options.max_batch, options.max_size),
        )
    )
    if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise DeployError(f"Profile of '{name}': {low} <= {best} <= {high} does not hold; reorder the sizes.")
    return low, best, high


def fill_shape(shape: Sequence[int], batch: int, size: tuple[int, int]) -> tuple[int, ...]:
    """An image shape with its open dimensions filled in: (-1, 3, -1, -1), 2, (64, 96) -> (2, 3, 64, 96)."""
    if len(shape) != 4:
        raise DeployError(
            f"An input of shape {tuple(shape)} is not a batch of images; [B, 3, H, W] is expected."
        )
    wanted = (batch, shape[1], *size)
    return tuple(want if have == -1 else have for have, want in zip(shape, wanted, strict=True))


def _last(messages: Sequence[str]) -> str:
    return messages[-1] if messages else "no message; look at the log"
