"""One interface for every runtime, so that building, evaluation, parity checks and timing are written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from core.errors import DeployError
from deploy.graph.model import external_files

FloatArray = NDArray[np.float32]
Worker = Callable[[FloatArray], dict[str, FloatArray]]


@dataclass(frozen=True)
class LayerTime:
    """Mean time of one layer in one call, as the runtime itself measured it."""

    name: str
    type: str
    precision: str
    milliseconds: float


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is built and loaded for; a runtime uses what concerns it. None leaves a choice to the runtime.

    Attributes:
        precision: of `core.choices.QUANTIZED` for a quantized graph; for a float one "f32", "f16" or "bf16".
        int8_hint: float precision of the float part of an INT8 engine, where it is chosen on loading; or "auto".
        variant: what the benchmark command names after a runtime: OpenVINO's precision hint, or ONNX Runtime's
            provider.
        batch: fixed batch; None leaves it as the file has it.
        image_size: (height, width) in pixels.
        threads: CPU threads.
        streams: calls that run at the same time.
        pinning: bind threads to cores.
        compute_capabilities: GPUs that TensorRT for RTX builds for, of `core.choices.CAPABILITIES`; none takes
            this machine's GPU, or `DEFAULT_CAPABILITIES` without one.
        cuda_graph: record calls as CUDA graphs.
        profile: path prefix for profiles, for `Runtime.layer_times`; None keeps no times.
        cache: folder for what makes later builds faster, such as timings of kernels.
        options: build options of the runtime's own, such as `tensorrt_builder.BuildOptions`; they replace what would
            follow from the other attributes.
    """

    precision: str | None = None
    int8_hint: str | None = None
    variant: str | None = None
    batch: int | None = None
    image_size: tuple[int, int] | None = None
    threads: int | None = None
    streams: int = 1
    pinning: bool | None = None
    compute_capabilities: tuple[str, ...] = ()
    cuda_graph: bool = False
    profile: Path | None = None
    cache: Path | None = None
    options: Any = None


class Runtime(ABC):
    """A loaded engine, and how engines of this kind are built and opened.

    Attributes:
        name: the runtime's name in `core.runtimes.RUNTIMES`.
        can_reshape: whether it can change a batch that the file has fixed.
        precision: of `core.choices.QUANTIZED` for a Q/DQ graph, otherwise the float precision that was asked for:
            "fp32", "bf16", "fp16".
        path: the model file.
        output_names: names of the outputs, in order.
        load_seconds: time from file to ready.
    """

    name: str
    can_reshape: ClassVar[bool] = False
    precision: str
    path: Path
    output_names: tuple[str, ...]
    load_seconds: float

    @classmethod
    @abstractmethod
    def require(cls, target: str | None = None) -> None:
        """Raise DeployError unless this machine has what the runtime needs; the message says how to get it.

        With a `target` it also raises where the installed version does not take graphs of that target.
        """

    @classmethod
    def can_run(cls) -> bool:
        """Whether this machine can run the engines that it builds; otherwise `open` raises."""
        return True

    @classmethod
    @abstractmethod
    def build(cls, onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
        """Build the engine of `onnx_path` in `out_dir`; returns its path.

        Raises:
            DeployError: the runtime's own refusal.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path, request: EngineRequest) -> Self:
        """Load an engine, or a file that the runtime reads as it is.

        Raises:
            DeployError: the runtime's own refusal.
        """

    @classmethod
    def stored_size(cls, path: Path) -> tuple[int, int] | None:
        """(height, width) of an engine's images if its file states it; never asked for .onnx files."""
        return None

    @classmethod
    def stored_inputs(cls, path: Path) -> list[ModelInput]:
        """Inputs of an engine; empty if its file does not state it. Never asked for .onnx files."""
        return []

    @classmethod
    def stored_batch(cls, path: Path) -> int | None:
        """The only batch that an engine takes, if its file states it; never asked for .onnx files."""
        return None

    @classmethod
    def stored_details(cls, path: Path) -> dict[str, Any]:
        """What an engine's file states without running it, as plain data; part of `details`."""
        return {}

    @abstractmethod
    def infer_outputs(self, images: FloatArray) -> dict[str, FloatArray]:
        """Run one batch: float32 [B, 3, H, W] in [0, 1] -> every output by name.

        Raises:
            DeployError: the array's type or shape is not what the engine takes.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the engine; it cannot be used afterwards."""

    def infer(self, images: FloatArray) -> FloatArray:
        """Run one batch and return the first output, [B, 4 + K, A] for a decoded detector."""
        return self.infer_outputs(images)[self.output_names[0]]

    def worker(self) -> Worker:
        """A function like `infer_outputs` for one more thread; runtimes that share a request give each its own."""
        return self.infer_outputs

    def layer_times(self) -> list[LayerTime]:
        """Times by layer since loading, for engines loaded with profiling.

        Raises:
            DeployError: this runtime reports nothing about layers, or was loaded without profiling.
        """
        raise DeployError(
            f"{self.name} was not loaded with profiling, or has no information about its layers."
        )

    def layer_samples(self) -> dict[str, list[float]]:
        """Milliseconds of every call since loading by layer, in the order the layers run, as `layer_times`.

        Raises:
            DeployError: this runtime does not keep single calls, or was loaded without profiling.
        """
        raise DeployError(f"{self.name} was not loaded with profiling, or keeps no times of single calls.")

    @property
    def size_bytes(self) -> int:
        """Size of the engine on disk."""
        return engine_size(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """What the exporter wrote into the file: class names, image size, form of the outputs and more."""
        return {}

    @property
    def details(self) -> dict[str, Any]:
        """What else a reader must know of figures of this engine, as plain data."""
        return self.stored_details(self.path)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that the runtime uses."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_images(images: FloatArray, runtime: str) -> FloatArray:
    """Return `images` contiguous; raises DeployError unless they are float32 [B, 3, H, W]."""
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != 3:
        raise DeployError(
            f"{runtime} got images of type {images.dtype} and shape {images.shape}; float32 [B, 3, H, W] in "
            "[0, 1] is "
            "expected. Convert with data.to_input."
        )
    return np.ascontiguousarray(images)


@dataclass(frozen=True)
class ModelInput:
    """One input of a model: its element type by NumPy's name, and its shape; None for open dimensions."""

    name: str
    type: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        shape = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.type} [{shape}]"

    @property
    def is_images(self) -> bool:
        """Whether it is what `infer_outputs` gives: float32 [B, 3, H, W]."""
        return self.type == "float32" and len(self.shape) == 4 and self.shape[1] in (3, None)


def engine_size(path: Path) -> int:
    """Bytes an engine takes on disk: the file, an OpenVINO .xml's .bin, an .onnx file's external data."""
    size = path.stat().st_size
    if path.suffix == ".onnx":
        size += sum(file.stat().st_size for file in external_files(path))
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and weights.is_file():
        size += weights.stat().st_size
    return size
