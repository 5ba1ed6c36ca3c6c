"""ONNX Runtime on the CPU. The only file that imports `onnxruntime`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from core.confinement import limited_time
from core.errors import DeployError
from core.files import write_bytes
from deploy.graph.model import Array, load_onnx, verify_onnx
from deploy.graph.passes import E4M3
from deploy.graph.quantizers import quantized_precision
from deploy.runtimes.base import EngineRequest, FloatArray, LayerTime, Runtime, check_images
from deploy.targets.outputs import plugin_hint

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError(
            "The onnxruntime runtime needs the package onnxruntime: pip install onnxruntime"
        ) from error
    return onnxruntime


class ONNXRuntime(Runtime):
    """An .onnx file in an ONNX Runtime session.

    Args:
        path: the model file.
        threads: CPU threads for one operator; None leaves the choice to ONNX Runtime.
        provider: "cpu" (default), "cuda" or "tensorrt"; the last two need onnxruntime-gpu, and refuse to fall
            back silently.
        optimize: graph optimizations on (default); off runs Q/DQ literally, node by node, as the integer
            reference.
        profile_prefix: let ONNX Runtime write a profile with this path prefix, for `layer_times`.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        provider: str = "cpu",
        optimize: bool = True,
        profile_prefix: Path | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise DeployError(f"Unknown provider '{provider}'; expected one of {', '.join(PROVIDERS)}.")
        onnxruntime = _onnxruntime()
        start = time.perf_counter()
        verify_onnx(path)
        self.path = path
        self._profile_prefix = profile_prefix
        self.precision = quantized_precision(load_onnx(path)) or "fp32"
        options = _session_options(onnxruntime, threads, optimize, profile_prefix)
        self._session: Any = _create_session(onnxruntime, path, options, _providers(onnxruntime, provider))
        self._input = self._session.get_inputs()[0].name
        self.output_names = tuple(output.name for output in self._session.get_outputs())
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def require(cls, target: str | None = None) -> None:
        """See `Runtime.require`."""
        _onnxruntime()

    @classmethod
    def build(cls, onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
        """ONNX Runtime reads ONNX itself: copy the file after checking it."""
        verify_onnx(onnx_path)
        destination = out_dir / onnx_path.name
        if destination.resolve() != onnx_path.resolve():
            write_bytes(destination, onnx_path.read_bytes())
        return destination

    @classmethod
    def open(cls, path: Path, request: EngineRequest) -> Self:
        """See `Runtime.open`; `variant` names the provider."""
        return cls(path, request.threads, request.variant or "cpu", profile_prefix=request.profile)

    def infer_outputs(self, images: FloatArray) -> dict[str, FloatArray]:
        """See `Runtime.infer_outputs`."""
        if self._session is None:
            raise DeployError(f"The ONNX Runtime session of {self.path} is closed; load it again.")
        images = check_images(images, "ONNX Runtime")
        try:
            with limited_time():
                results = self._session.run(None, {self._input: images})
        except _errors(_onnxruntime()) as error:
            raise DeployError(
                f"ONNX Runtime failed on {self.path.name} with images {images.shape}: {error}"
            ) from error
        return {name: np.asarray(value) for name, value in zip(self.output_names, results, strict=True)}

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def layer_times(self) -> list[LayerTime]:
        """See `Runtime.layer_times`; ends the profile, so it can be asked once."""
        if self._profile_prefix is None or self._session is None:
            return super().layer_times()
        file = Path(self._session.end_profiling())
        self._profile_prefix = None
        events = json.loads(file.read_text())
        file.unlink()
        kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        calls = max(1, sum(event["name"] == "model_run" for event in events))
        totals: dict[str, float] = {}
        for event in kernels:
            totals[event["name"]] = totals.get(event["name"], 0.0) + event["dur"] / 1000
        types = {event["name"]: event["args"] for event in kernels}
        return [
            LayerTime(
                name.removesuffix("_kernel_time"),
                types[name]["op_name"],
                _kernel_precision(types[name]),
                total / calls,
            )
            for name, total in totals.items()
        ]

    @property
    def metadata(self) -> dict[str, str]:
        """See `Runtime.metadata`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def versions(self) -> dict[str, str]:
        """ONNX Runtime's version."""
        return {"onnxruntime": str(_onnxruntime().__version__)}


def _kernel_precision(arguments: Mapping[str, Any]) -> str:
    """The type of a kernel's first input, according to the profile."""
    inputs = arguments.get("input_type_shape") or [{}]
    return next(iter(inputs[0]), "")


def _session_options(
    onnxruntime: Any, threads: int | None, optimize: bool, profile_prefix: Path | None
) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return options


def _providers(onnxruntime: Any, provider: str) -> list[str]:
    wanted = PROVIDERS[provider]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise DeployError(
            f"ONNX Runtime has no {wanted} here (it has {', '.join(available)}); install onnxruntime-gpu "
            "for it."
        )
    return [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]


def _create_session(onnxruntime: Any, path: Path, options: Any, providers: Sequence[str]) -> Any:
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except _errors(onnxruntime) as error:
        raise DeployError(f"ONNX Runtime cannot load {path}: {error}.{plugin_hint(error)}") from error
    if providers[0] not in session.get_providers():
        raise DeployError(
            f"ONNX Runtime fell back to {session.get_providers()} where {providers[0]} was asked for."
        )
    return session


def _errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    state = onnxruntime.capi.onnxruntime_pybind11_state
    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    )


def record_histograms(
    model: ModelProto, tensors: Sequence[str], batches: Iterable[FloatArray], bins: int = 1024
) -> dict[str, tuple[float, float, NDArray[np.float64]]]:
    """Run a graph on images and return (low, high, counts [bins]) of each named tensor.

    The first batch fixes the range, doubled on both sides; what falls outside later is counted at the ends.
    """
    if not tensors:
        return {}  # ONNX Runtime takes an empty list of outputs for all of them
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in tensors if name not in present
    )
    session = _memory_session(copy)
    feed = session.get_inputs()[0].name
    found: dict[str, tuple[float, float, NDArray[np.float64]]] = {}
    for images in batches:
        for name, value in zip(tensors, session.run(list(tensors), {feed: images}), strict=True):
            if name not in found:
                found[name] = (
                    2 * min(float(value.min()), -0.05),
                    2 * max(float(value.max()), 0.05),
                    np.zeros(bins),
                )
            low, high, counts = found[name]
            counts += np.histogram(np.clip(value, low, high), bins, (low, high))[0]
    if not found:
        raise DeployError("No images to measure ranges on; give at least one batch.")
    return found


def run_model(model: ModelProto, images: FloatArray) -> FloatArray:
    """First output of a graph in memory, computed node by node without optimizations: the integer reference."""
    session = _memory_session(model)
    (result, *_) = session.run(None, {session.get_inputs()[0].name: check_images(images, "ONNX Runtime")})
    return np.asarray(result)


class CodeRecorder:
    """Runs a Q/DQ graph node by node and gives the codes of every activation quantizer.

    Args:
        path: the ONNX file.

    Raises:
        DeployError: no quantizer in it, or one whose zero point is not in the file.
    """

    def __init__(self, path: Path) -> None:
        verify_onnx(path)
        model = load_onnx(path)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._zero_points: dict[str, Array] = {}
        self._outputs: dict[str, str] = {}
        for node in model.graph.node:
            if node.op_type != "QuantizeLinear":
                continue
            zero_point = constants.get(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
            if zero_point is None or zero_point.size != 1:
                raise DeployError(f"'{node.name}' of {path} has no single zero point in the file.")
            self._zero_points[node.name] = zero_point
            self._outputs[node.name] = node.output[0]
        if not self._outputs:
            raise DeployError(f"{path} has no QuantizeLinear on activations; give a quantized graph.")
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in self._outputs.values())
        self._session = _memory_session(model)

    def codes(self, images: FloatArray) -> dict[str, NDArray[np.int16]]:
        """Name of each QuantizeLinear node -> its codes for a batch, in steps from the zero point.

        FP8 codes become their places in the rising order of all codes: a sign, and 0 to 126.
        """
        feed = {self._session.get_inputs()[0].name: check_images(images, "ONNX Runtime")}
        results = self._session.run(list(self._outputs.values()), feed)
        return {
            name: _steps(result, self._zero_points[name])
            for name, result in zip(self._outputs, results, strict=True)
        }


def _steps(codes: Array, zero_point: Array) -> NDArray[np.int16]:
    if zero_point.dtype != E4M3:
        return codes.astype(np.int16) - np.int16(zero_point.item())
    bits = codes.view(np.uint8).astype(np.int16)
    return np.where(bits < 128, bits, 128 - bits)


def _memory_session(model: ModelProto) -> Any:
    onnxruntime = _onnxruntime()
    options = _session_options(onnxruntime, None, False, None)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS["cpu"]])
