"""From a runtime's name or a file to the class in charge: build, open, and what a file states about itself."""

from __future__ import annotations

from pathlib import Path

from onnx import helper

from core.confinement import limited_time
from core.errors import DeployError
from core.registry import resolve
from core.runtimes import RUNTIMES
from deploy.graph.model import graph_inputs, load_onnx, stored_metadata, stored_size
from deploy.runtimes.base import EngineRequest, ModelInput, Runtime


def runtime_class(name: str) -> type[Runtime]:
    """The class of a runtime; raises DeployError on an unknown name."""
    found: type[Runtime] = resolve(RUNTIMES[name].factory)
    return found


def build_engine(runtime: str, onnx_path: Path, out_dir: Path, request: EngineRequest | None = None) -> Path:
    """Build the engine of `onnx_path` in `out_dir`; returns its path. See each runtime's `build`.

    Raises:
        DeployError: unknown runtime, or the runtime's own refusal.
    """
    return runtime_class(runtime).build(onnx_path, out_dir, request or EngineRequest())


def open_engine(runtime: str, path: Path, request: EngineRequest | None = None) -> Runtime:
    """Load an engine, or a file that the runtime reads as it is.

    Raises:
        DeployError: unknown runtime, a file of another runtime, or the runtime's own refusal.
    """
    entry = RUNTIMES[runtime]
    if path.suffix not in entry.suffixes:
        if path.suffix == ".onnx":
            remedy = "it runs engines, build one with deploy.engine build"
        else:
            remedy = f"{runtime_of(path)} does"
        raise DeployError(f"{entry.title} does not take {path.name}: {remedy}.")
    with limited_time():
        check_inputs(path)
        engine = runtime_class(runtime).open(path, request or EngineRequest())
    return engine


def runs_on_cpu(path: Path) -> bool:
    """Whether a file is for runtimes that run on the CPU alone, by its ending."""
    return path.suffix in (".onnx", ".xml")


def runtime_of(path: Path, otherwise: str = "openvino") -> str:
    """The runtime that a file is made for; `otherwise` for an .onnx file for no runtime that reads ONNX.

    Raises:
        DeployError: no runtime opens files with this ending, or the .onnx file cannot be read.
    """
    if path.suffix == ".onnx":
        target = stored_metadata(load_onnx(path)).get("octet.target")
        found = (e.name for e in RUNTIMES.values() if e.reads_onnx and target in e.targets)
        return next(found, otherwise)
    found = (entry.name for entry in RUNTIMES.values() if path.suffix in entry.suffixes)
    name = next(found, None)
    if name is None:
        endings = dict.fromkeys(ending for entry in RUNTIMES.values() for ending in entry.suffixes)
        raise DeployError(f"No runtime opens {path.name}: expected a file that ends in {', '.join(endings)}.")
    return name


def find_image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of a model's images from its input shape or its metadata, None if neither states it.

    Raises:
        DeployError: the file cannot be read.
    """
    if path.suffix != ".onnx":
        return runtime_class(runtime_of(path)).stored_size(path)
    model = load_onnx(path)
    inputs = graph_inputs(model)
    dims = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(dims) == 4 and all(dims[2:]):
        return dims[2], dims[3]
    return stored_size(stored_metadata(model))


def find_batch(path: Path) -> int | None:
    """The only batch that a model takes, None where it takes any or its file does not state it.

    Raises:
        DeployError: the file cannot be read.
    """
    if path.suffix != ".onnx":
        return runtime_class(runtime_of(path)).stored_batch(path)
    inputs = list_inputs(path)
    return inputs[0].shape[0] if inputs and inputs[0].shape else None


def list_inputs(path: Path) -> list[ModelInput]:
    """Inputs of a model; empty if its file does not state it.

    Raises:
        DeployError: the file cannot be read.
    """
    if path.suffix != ".onnx":
        return runtime_class(runtime_of(path)).stored_inputs(path)
    found = []
    for value in graph_inputs(load_onnx(path)):
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value or None for dim in tensor.shape.dim)
        found.append(ModelInput(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape))
    return found


def check_inputs(path: Path) -> None:
    """Refuse models that take anything but one batch of images, before they are loaded.

    Raises:
        DeployError: they do; the message lists the inputs.
    """
    inputs = list_inputs(path)
    if inputs and (len(inputs) > 1 or not inputs[0].is_images):
        raise DeployError(
            f"{path.name} takes {'; '.join(map(str, inputs))}: expected one input, float32 [B, 3, H, W] of images in "
            "[0, 1]. Export it with such an input; what else the network needs goes into the graph."
        )
