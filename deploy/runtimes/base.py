"""One interface for every engine, so that evaluation, parity checks and timing are written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from core.errors import DeployError

FloatArray = NDArray[np.float32]


Worker = Callable[[FloatArray], dict[str, FloatArray]]


@dataclass(frozen=True)
class LayerTime:
    """Mean time of one layer in one call, as the runtime itself measured it."""

    name: str
    type: str
    precision: str
    milliseconds: float


class Runtime(ABC):
    """A loaded engine.

    Attributes:
        name: runtime's name: "openvino", "onnxruntime", "tensorrt".
        precision: "int8" for a Q/DQ graph, otherwise the float precision that was asked for: "fp32", "bf16",
            "fp16".
        path: the model file.
        output_names: names of the outputs, in order.
        load_seconds: time from file to ready.
    """

    name: str
    precision: str
    path: Path
    output_names: tuple[str, ...]
    load_seconds: float

    @classmethod
    @abstractmethod
    def require(cls) -> None:
        """Raise DeployError unless this machine has what the runtime needs; the message says how to get it."""

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
            DeployError: this runtime tells nothing about layers, or was loaded without profiling.
        """
        raise DeployError(f"{self.name} was not loaded with profiling, or tells nothing about its layers.")

    @property
    def size_bytes(self) -> int:
        """Size of the engine on disk."""
        return engine_size(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """What the exporter wrote into the file: class names, image size, form of the outputs and more."""
        return {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries behind the runtime."""
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


def engine_size(path: Path) -> int:
    """Bytes an engine takes on disk: the file, and for an OpenVINO .xml its .bin as well."""
    size = path.stat().st_size
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and weights.is_file():
        size += weights.stat().st_size
    return size
