"""TensorRT engines on torch CUDA tensors: named tensors, no pycuda, CUDA graphs on demand; 8.6, 10 and 11.

TensorRT for RTX has the same calls; `deploy.runtimes.tensorrt_rtx` only builds and reads its files differently.

Load only engines you built: a plan file is code for the GPU. The sidecar's hash is compared first.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from core.errors import DeployError
from core.files import write_json
from deploy.graph.model import stored_size
from deploy.runtimes.base import EngineRequest, FloatArray, LayerTime, Runtime, check_images
from deploy.runtimes.sidecars import read_sidecar
from deploy.runtimes.tensorrt_api import check_target, import_tensorrt, make_logger, rules_of
from deploy.runtimes.tensorrt_builder import BuildOptions, build_tensorrt, gpu_name, sidecar_path

MAX_GRAPHS = 8
COMPARED = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "gpu": "GPU",
    "engine_sha256": "content",
}
"""Keys of sidecars whose values have to be those of this machine and file -> what messages call them."""


class Device(Protocol):
    """Where tensors live and work is queued; the tests have one without a GPU."""

    name: str

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New tensor on the device."""

    def stream(self) -> int:
        """Handle of the stream that work is queued on."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def capture(self, context: Any) -> Any:
        """Record one run of a context; the result has `replay()`."""


class CudaDevice:
    """A CUDA device with a stream of its own: TensorRT warns about extra synchronization on the default one."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise DeployError(
                "torch sees no CUDA device; a TensorRT engine needs a GPU and its driver to run."
            )
        self.name = f"cuda:{index}"
        self._stream = torch.cuda.Stream(self.name)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.name)

    def stream(self) -> int:
        """See `Device`."""
        return int(self._stream.cuda_stream)

    def synchronize(self) -> None:
        """See `Device`."""
        self._stream.synchronize()

    def capture(self, context: Any) -> Any:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return graph


@dataclass
class Binding:
    """A context with its buffers for one input shape, and its CUDA graph."""

    context: Any
    images: Tensor
    outputs: dict[str, Tensor]
    graph: Any = None


class TensorRTRuntime(Runtime):
    """An engine built by `build_tensorrt`.

    Args:
        path: NAME.engine with NAME.engine.json next to it.
        use_cuda_graph: record each input shape once and replay it; saves launch time on small networks.
        profile: keep times of layers, for `layer_times`; not together with CUDA graphs.
        device: where to run; None is the first CUDA device.
        trt: the tensorrt module, given by tests.

    Raises:
        DeployError: TensorRT or a GPU is missing, or the engine belongs to another version or GPU.
    """

    name = "tensorrt"
    title = "TensorRT"

    def __init__(
        self,
        path: Path,
        use_cuda_graph: bool = False,
        profile: bool = False,
        device: Device | None = None,
        trt: Any = None,
    ) -> None:
        if use_cuda_graph and profile:
            raise DeployError(
                "Layers cannot be timed inside a CUDA graph; choose one of use_cuda_graph and profile."
            )
        start = time.perf_counter()
        self._trt = self.import_library() if trt is None else trt
        self.path = path
        self.sidecar, plan = self.read(path, str(self._trt.__version__))
        self.precision = str(self.sidecar["precision"])
        self.device: Device = CudaDevice() if device is None else device
        self._use_cuda_graph = use_cuda_graph
        self._logger = make_logger(self._trt)
        self._trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime: Any = self._trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DeployError(
                f"{self.title} cannot load {path}: {'; '.join(self._logger.errors)}. Build it again."
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {n: self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.INPUT for n in names}
        self._input = next(name for name in names if is_input[name])
        self.output_names = tuple(name for name in names if not is_input[name])
        self._profiler = make_profiler(self._trt) if profile else None
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def import_library(cls) -> Any:
        """The Python module of the library; raises DeployError where it is not installed, or not supported."""
        trt = import_tensorrt()
        rules_of(str(trt.__version__))
        return trt

    @classmethod
    def read(cls, path: Path, version: str) -> tuple[dict[str, Any], bytes]:
        """Sidecar and plan of an engine for this `version` and GPU; raises DeployError where it is for others."""
        rules_of(version)
        return read_engine(path, {"tensorrt": version, "gpu": gpu_name()})

    @classmethod
    def require(cls, target: str | None = None) -> None:
        """See `Runtime.require`."""
        cls.import_library()
        CudaDevice()
        if target is not None:
            check_target(target)

    @classmethod
    def build(cls, onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
        """NAME.engine with NAME.engine.json, built on the GPU it is to run on."""
        return build_tensorrt(onnx_path, out_dir, request.options or BuildOptions.of(request))

    @classmethod
    def open(cls, path: Path, request: EngineRequest) -> Self:
        """See `Runtime.open`."""
        return cls(path, use_cuda_graph=request.cuda_graph, profile=request.profile is not None)

    @classmethod
    def stored_size(cls, path: Path) -> tuple[int, int] | None:
        """See `Runtime.stored_size`: from the metadata in the sidecar."""
        return stored_size(_sidecar_metadata(path))

    @classmethod
    def stored_batch(cls, path: Path) -> int | None:
        """See `Runtime.stored_batch`: from the metadata in the sidecar."""
        batch = str(_sidecar_metadata(path).get("octet.batch", ""))
        return int(batch) if batch.isdecimal() else None

    # ----------------------------------------------------------------------------------------------------- inference
    def infer_outputs(self, images: FloatArray) -> dict[str, FloatArray]:
        """See `Runtime.infer_outputs`; copies to the GPU and back."""
        results = self.infer_tensors(torch.from_numpy(check_images(images, self.title)))
        return {name: result.to("cpu", torch.float32, copy=True).numpy() for name, result in results.items()}

    def infer_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """Run images [B, 3, H, W] and return the outputs on the device, valid until the next call of this shape."""
        if self._engine is None:
            raise DeployError(f"The {self.title} engine {self.path} is closed; load it again.")
        shape = tuple(images.shape)
        binding = self._bindings.get(shape)
        if binding is None:
            binding = self._bind(shape)
        binding.images.copy_(images)
        torch_is_done(binding.images)
        if binding.graph is not None:
            binding.graph.replay()
            torch_is_done(binding.images)
        else:
            if not binding.context.execute_async_v3(self.device.stream()):
                raise DeployError(
                    f"{self.title} failed on {self.path.name}: {'; '.join(self._logger.errors)}"
                )
            self.device.synchronize()
        return binding.outputs

    def _bind(self, shape: tuple[int, ...]) -> Binding:
        """A context for this shape: one for all shapes without CUDA graphs, one each with them."""
        if self._use_cuda_graph:
            while len(self._bindings) >= MAX_GRAPHS:
                self._bindings.pop(next(iter(self._bindings)))
            context = self._engine.create_execution_context()
        else:
            known = next(iter(self._bindings.values()), None)
            context = known.context if known is not None else self._engine.create_execution_context()
            self._bindings.clear()
        if self._profiler is not None:
            context.profiler = self._profiler
        if not context.set_input_shape(self._input, shape):
            raise DeployError(
                f"{self.path.name} does not take images {list(shape)}; its profile is {self.profile_shapes()}."
            )
        binding = Binding(context, self._buffer(self._input, shape), {})
        context.set_tensor_address(self._input, binding.images.data_ptr())
        for name in self.output_names:
            result = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in result):
                raise DeployError(
                    f"Output '{name}' has the shape {result}, which is known at run time only; export with "
                    "outputs=efficient_nms or outputs=decoded."
                )
            binding.outputs[name] = self._buffer(name, result)
            context.set_tensor_address(name, binding.outputs[name].data_ptr())
        if self._use_cuda_graph:
            context.execute_async_v3(self.device.stream())  # TensorRT prepares itself on the first run
            self.device.synchronize()
            binding.graph = self.device.capture(context)
        self._bindings[shape] = binding
        return binding

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.device.empty(shape, torch_type(self._trt, self._engine.get_tensor_dtype(name)))

    # ---------------------------------------------------------------------------------------------------- inspection
    def profile_shapes(self) -> list[list[int]]:
        """Smallest, best and largest input shape the engine takes."""
        return [list(shape) for shape in self._engine.get_tensor_profile_shape(self._input, 0)]

    def layer_information(self) -> dict[str, Any]:
        """Layers as TensorRT built them, with their types; TensorRT 11's names are brought to those of 10."""
        inspector = self._engine.create_engine_inspector()
        if self._bindings:
            inspector.execution_context = next(iter(self._bindings.values())).context
        information = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        if "I/O Tensors" in information:
            information["Bindings"] = information.pop("I/O Tensors")
        return dict(information)

    def write_layers(self, path: Path) -> None:
        """Write layer information, and layer times where they were kept, as JSON."""
        times = [] if self._profiler is None else self.layer_times()
        content = {"information": self.layer_information(), "times": [vars(layer) for layer in times]}
        write_json(path, content)

    def layer_times(self) -> list[LayerTime]:
        """See `Runtime.layer_times`."""
        if self._profiler is None or not self._profiler.milliseconds:
            return super().layer_times()
        return [
            LayerTime(name, "", "", sum(times) / len(times)) for name, times in self.layer_samples().items()
        ]

    def layer_samples(self) -> dict[str, list[float]]:
        """See `Runtime.layer_samples`."""
        if self._profiler is None or not self._profiler.milliseconds:
            return super().layer_samples()
        return {name: list(times) for name, times in self._profiler.milliseconds.items()}

    def close(self) -> None:
        """Release contexts, engine and runtime, in this order."""
        self._bindings.clear()
        self._engine = None
        self._runtime = None

    @property
    def metadata(self) -> dict[str, str]:
        """See `Runtime.metadata`."""
        return {str(key): str(value) for key, value in self.sidecar.get("metadata", {}).items()}

    @property
    def versions(self) -> dict[str, str]:
        """TensorRT's version and the GPU."""
        return {"tensorrt": str(self._trt.__version__), "gpu": str(self.sidecar["gpu"])}


def torch_is_done(tensor: Tensor) -> None:
    """Wait for copies and replays that torch queued on its own stream."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def read_engine(path: Path, here: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    """Sidecar and plan of an engine, after comparing its hash, and what `here` names by keys of `COMPARED`."""
    sidecar_file = sidecar_path(path)
    if not path.is_file() or not sidecar_file.is_file():
        raise DeployError(f"No engine {path} with {sidecar_file.name} next to it; build one.")
    try:
        sidecar = read_sidecar(path)
        built = {key: sidecar[key] for key in (*here, "engine_sha256")}
        str(sidecar["precision"])
    except KeyError as error:
        raise DeployError(
            f"{sidecar_file} is not an engine's description ({error!r}); build the engine again."
        ) from error
    plan = path.read_bytes()
    for key, now in {**here, "engine_sha256": hashlib.sha256(plan).hexdigest()}.items():
        if built[key] != now:
            raise DeployError(
                f"{path} was built with {COMPARED[key]} {built[key]}, here is {now}; build it again on this machine."
            )
    return sidecar, plan


def torch_type(trt: Any, dtype: Any) -> torch.dtype:
    """Torch's type for a TensorRT tensor."""
    known = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT8: torch.int8,
        trt.DataType.BOOL: torch.bool,
    }
    if dtype not in known:
        raise DeployError(
            f"An engine tensor has the type {dtype}; expected one of {', '.join(map(str, known))}."
        )
    return known[dtype]


def make_profiler(trt: Any) -> Any:
    """A profiler that keeps the time of every layer in every run."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.milliseconds: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds.setdefault(layer_name, []).append(ms)

    return Profiler()


def _sidecar_metadata(path: Path) -> dict[str, str]:
    found: dict[str, str] = read_sidecar(path).get("metadata", {}) if sidecar_path(path).is_file() else {}
    return found
