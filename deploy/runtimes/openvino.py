"""OpenVINO: the CPU default. The only file that imports `openvino`.

OpenVINO runs symmetric Q/DQ graphs as real INT8. Left alone it picks BF16 for the float part on machines with
AMX, so every figure has to name its precision hint; the default here is "f32".
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from core.choices import INT8
from core.confinement import limited_time
from core.errors import DeployError
from core.files import written_atomically
from core.runtimes import PRECISION_NAMES
from deploy.graph.model import verify_onnx
from deploy.runtimes.base import (
    EngineRequest,
    FloatArray,
    LayerTime,
    ModelInput,
    Runtime,
    Worker,
    check_images,
)
from deploy.targets.outputs import plugin_hint

AUTO = "auto"
TELEMETRY = "openvino_telemetry"


def _openvino() -> Any:
    """The package, without its telemetry: that would post to an analytics host and write into the home folder.

    `import openvino` starts it. Where the telemetry package cannot be imported, OpenVINO uses a stub of its own.
    """
    if "openvino" not in sys.modules:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        import openvino
    except ImportError as error:
        raise DeployError("The openvino runtime needs the package openvino: pip install openvino") from error
    return openvino


@functools.cache
def _core() -> Any:
    """The process's one Core.

    It is never let go: when the last Core is destroyed OpenVINO unloads its CPU plugin, and the next parallel torch
    operation of the same process then dies of a segmentation fault (seen with 2026.4.1 and torch 2.15).
    """
    return _openvino().Core()


def _read_model(path: Path) -> Any:
    """Read an .onnx or an .xml file, after the checks that untrusted files get."""
    if path.suffix == ".onnx":
        verify_onnx(path)
    elif path.suffix == ".xml":
        missing = [part for part in (path, path.with_suffix(".bin")) if not part.is_file()]
        if missing:
            raise DeployError(
                f"No {missing[0]}: an OpenVINO engine is an .xml file with a .bin of the same name; build it again."
            )
    else:
        raise DeployError(f"OpenVINO reads .onnx and .xml files, got '{path.name}'.")
    try:
        return _core().read_model(str(path))
    except RuntimeError as error:
        raise DeployError(f"OpenVINO cannot read {path}: {error}.{plugin_hint(error)}") from error


def _stored_inputs(path: Path) -> tuple[ModelInput, ...]:
    """Inputs of a file, which is read once however often they are asked for."""
    status = path.stat() if path.is_file() else None
    return _inputs_of(path, (status.st_mtime_ns, status.st_size) if status else None)


@functools.lru_cache(maxsize=8)
def _inputs_of(path: Path, version: tuple[int, int] | None) -> tuple[ModelInput, ...]:
    """Inputs of a file in this version (time of its last change, bytes)."""
    return tuple(
        ModelInput(
            value.get_any_name(),
            str(value.element_type.to_dtype()),
            tuple(None if size.is_dynamic else size.get_length() for size in value.partial_shape),
        )
        for value in _read_model(path).inputs
    )


class OpenVINORuntime(Runtime):
    """An .onnx or .xml file compiled for the CPU.

    Args:
        path: the model file.
        precision_hint: "f32" (default), "bf16" or "f16" for the float part; "auto" leaves it to OpenVINO, which takes
            "bf16" where the processor has it. The attribute `precision_hint` says what it became.
        threads: CPU threads; None leaves the choice to OpenVINO.
        batch: fix the batch; None keeps it as the file has it (dynamic in Octet's exports). A fixed batch is
            faster.
        image_size: (height, width) to fix where the file leaves them open.
        streams: requests that run at the same time; 1 serves latency, more of them throughput.
        pinning: bind threads to cores; None leaves it to OpenVINO.
        profile: let OpenVINO count the time of every layer, for `layer_times`.
    """

    name = "openvino"
    can_reshape = True

    def __init__(
        self,
        path: Path,
        precision_hint: str | None = None,
        threads: int | None = None,
        batch: int | None = None,
        image_size: tuple[int, int] | None = None,
        streams: int = 1,
        pinning: bool | None = None,
        profile: bool = False,
    ) -> None:
        hint = precision_hint or "f32"
        if hint not in (*PRECISION_NAMES, AUTO):
            raise DeployError(
                f"Unknown precision hint '{hint}'; expected one of {', '.join((*PRECISION_NAMES, AUTO))}."
            )
        start = time.perf_counter()
        self.path = path
        model = _read_model(path)
        self.input_shape = _fix_shape(model, batch, image_size)
        self._metadata = _metadata(model)
        config: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": str(streams),
            "PERF_COUNT": profile,
        }
        if hint != AUTO:
            config["INFERENCE_PRECISION_HINT"] = hint
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        if pinning is not None:
            config["ENABLE_CPU_PINNING"] = pinning
        try:
            self._compiled = _core().compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise DeployError(f"OpenVINO cannot compile {path} with {config}: {error}") from error
        self.precision_hint = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.precision = INT8 if _is_quantized(model) else PRECISION_NAMES[self.precision_hint]
        self._request: Any = self._compiled.create_infer_request()
        self._profiled: dict[str, list[Any]] | None = {} if profile else None
        self.output_names = tuple(
            sorted(output.get_names())[0] if output.get_names() else f"output{index}"
            for index, output in enumerate(self._compiled.outputs)
        )
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def require(cls, target: str | None = None) -> None:
        """See `Runtime.require`."""
        _openvino()

    @classmethod
    def build(cls, onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
        """Convert an ONNX file to OpenVINO IR, NAME.xml and NAME.bin, without rounding float weights."""
        model = _read_model(onnx_path)
        path = out_dir / f"{onnx_path.stem}.xml"
        with written_atomically(path.with_suffix(".bin"), path) as (weights, graph):
            _openvino().save_model(model, str(graph), compress_to_fp16=False)
            graph.with_suffix(".bin").replace(weights)
        return path

    @classmethod
    def open(cls, path: Path, request: EngineRequest) -> Self:
        """See `Runtime.open`; the precision is a hint, for INT8 engines `int8_hint`."""
        hint = request.int8_hint if request.precision == INT8 else request.precision
        return cls(
            path,
            precision_hint=request.variant or hint,
            threads=request.threads,
            batch=request.batch,
            image_size=request.image_size,
            streams=request.streams,
            pinning=request.pinning,
            profile=request.profile is not None,
        )

    @classmethod
    def stored_size(cls, path: Path) -> tuple[int, int] | None:
        """See `Runtime.stored_size`."""
        shape = _stored_inputs(path)[0].shape
        if len(shape) != 4 or shape[2] is None or shape[3] is None:
            return None
        return shape[2], shape[3]

    @classmethod
    def stored_inputs(cls, path: Path) -> list[ModelInput]:
        """See `Runtime.stored_inputs`."""
        return list(_stored_inputs(path))

    @classmethod
    def stored_batch(cls, path: Path) -> int | None:
        """See `Runtime.stored_batch`."""
        shape = _stored_inputs(path)[0].shape
        return shape[0] if shape else None

    def infer_outputs(self, images: FloatArray) -> dict[str, FloatArray]:
        """See `Runtime.infer_outputs`."""
        if self._request is None:
            raise DeployError(f"The OpenVINO engine of {self.path} is closed; load it again.")
        outputs = self._infer(self._request, images)
        if self._profiled is not None:
            for info in self._request.profiling_info:
                self._profiled.setdefault(info.node_name, []).append(info)
        return outputs

    def worker(self) -> Worker:
        """A function with an infer request of its own."""
        request = self._compiled.create_infer_request()
        return lambda images: self._infer(request, images)

    def _infer(self, request: Any, images: FloatArray) -> dict[str, FloatArray]:
        images = check_images(images, "OpenVINO")
        try:
            with limited_time():
                results = request.infer({0: images}, share_inputs=True)
        except RuntimeError as error:
            shape = list(images.shape)
            if not self._compiled.input(0).partial_shape.compatible(_openvino().PartialShape(shape)):
                raise DeployError(
                    f"OpenVINO engine {self.path.name} takes images {self.input_shape}, got {shape}; export with "
                    "deploy.dynamic_batch or deploy.dynamic_size to leave dimensions open."
                ) from None
            raise DeployError(
                f"OpenVINO engine {self.path.name} failed on images {shape}: {error}"
            ) from error
        return {name: np.array(results[index]) for index, name in enumerate(self.output_names)}

    def layer_times(self) -> list[LayerTime]:
        """See `Runtime.layer_times`; layers that were fused into others are left out."""
        if not self._profiled:
            return super().layer_times()
        return [
            LayerTime(
                name,
                str(self._profiled[name][0].node_type),
                str(self._profiled[name][0].exec_type).rsplit("_", 1)[-1],
                float(np.mean(times)),
            )
            for name, times in self.layer_samples().items()
        ]

    def layer_samples(self) -> dict[str, list[float]]:
        """See `Runtime.layer_samples`."""
        if not self._profiled:
            return super().layer_samples()
        return {
            name: [info.real_time.total_seconds() * 1000 for info in infos]
            for name, infos in self._profiled.items()
            if str(infos[0].status) == "Status.EXECUTED"
        }

    def close(self) -> None:
        """Release the compiled model."""
        self._request = None
        self._compiled = None

    @property
    def metadata(self) -> dict[str, str]:
        """See `Runtime.metadata`; OpenVINO keeps an ONNX file's in the IR."""
        return dict(self._metadata)

    @property
    def versions(self) -> dict[str, str]:
        """OpenVINO's version."""
        return {"openvino": str(_openvino().__version__)}

    @property
    def details(self) -> dict[str, Any]:
        """See `Runtime.details`: the precision of the float part."""
        return {"precision_hint": self.precision_hint}


def _metadata(model: Any) -> dict[str, str]:
    """What the ONNX file said about itself; OpenVINO files it under "framework"."""
    if not model.has_rt_info("framework"):
        return {}
    stored = model.get_rt_info("framework").value
    return {str(key): str(value) for key, value in stored.items()} if isinstance(stored, dict) else {}


def _fix_shape(model: Any, batch: int | None, image_size: tuple[int, int] | None) -> str:
    shape = model.inputs[0].partial_shape
    if batch is not None or image_size is not None:
        wanted = list(shape)
        if batch is not None:
            wanted[0] = batch
        if image_size is not None:
            wanted[2], wanted[3] = image_size
        try:
            model.reshape({0: wanted})
        except RuntimeError as error:
            raise DeployError(
                f"The graph takes images {shape}; it cannot be fixed to batch {batch}, size {image_size}. Use the "
                "batch and size that it has, or export it with dynamic_batch=true or dynamic_size=true."
            ) from error
    return str(model.inputs[0].partial_shape)


def _is_quantized(model: Any) -> bool:
    """Whether the graph has fake quantization: OpenVINO turns Q/DQ pairs of activations into FakeQuantize."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
