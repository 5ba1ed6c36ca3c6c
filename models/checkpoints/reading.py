"""The content of a checkpoint file of any tool: tensors by name and plain facts, read without running anything.

Torch zip files (pickled models of the official YOLOv9 trainer and of Ultralytics, plain state dicts), `.safetensors`
and `.npz` all end up as one `Checkpoint`. Which network it fits is `models.checkpoints.convert`'s business.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from torch import Tensor

from core.documents import shown
from core.errors import CheckpointError
from models.checkpoints.archive import TorchArchive, read_json, read_npz, read_safetensors
from models.checkpoints.containers import find_format
from models.checkpoints.inert_records import Record, TensorRecord

MAX_MODULES = 50_000
MAX_DEPTH = 64
MAX_PATH = 1000
MAX_TENSORS = 100_000
MAX_NAME = 200
MAX_NAMES = 10_000
ENTRIES_BY_PREFERENCE = ("ema", "model", "state_dict", "model_state_dict")
MANIFEST_TYPES: dict[str, tuple[type | UnionType, str]] = {
    "architecture": (str, "a text"),
    "activation": (str, "a text"),
    "head": (str, "a text"),
    "sha256": (str, "a text"),
    "names": (list, "a list of class names"),
    "batch_norm_eps": (int | float, "a number"),
}
BATCH_NORM_CLASS = "torch.nn.modules.batchnorm.BatchNorm2d"
IDENTITY_CLASS = "torch.nn.modules.linear.Identity"
MAX_LEVELS = 8
MAX_STRIDE = 1024
ACTIVATION_CLASSES = {"torch.nn.modules.activation.SiLU": "silu", "torch.nn.modules.activation.ReLU": "relu"}


@dataclass
class Checkpoint:
    """Tensors by the names the file uses, in the types it stores, and what else is known.

    Attributes:
        state: Parameters and buffers.
        metadata: `format` (`torch`, `npz` or `safetensors`), and where known `entry` (which of the file's models),
            `model_class`, `names` (class names), `activation`, `activated` (path of a convolution's block -> whether
            an activation follows), `activation_classes`, `batch_norm_epsilons`, `strides`, `epoch`, `manifest` (what
            `save_detector` wrote).
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def amax(self) -> dict[str, Tensor]:
        """Ranges of a quantized checkpoint by the file's names; `load_detector` gives them by ours."""
        return {
            key.removesuffix("._amax"): tensor for key, tensor in self.state.items() if key.endswith("._amax")
        }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; of several models in a file the EMA is preferred.

    Args:
        path: A `.pt`/`.pth`/`.ckpt` torch zip file, a `.safetensors` or an `.npz` file. The content decides, not the
            ending.

    Raises:
        CheckpointError: If the file is missing, damaged, holds no model, or asks for anything to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"Checkpoint {path} does not exist or is not a file; give the path of a weights file"
        )
    found = find_format(path)
    if found == "safetensors":
        return _read_safetensors(path)
    if found == "npz":
        return Checkpoint(read_npz(path), {"format": "npz"})
    with TorchArchive(path) as archive:
        return _read_torch(archive)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a `.safetensors` file lies: `x.safetensors` -> `x.safetensors.json`."""
    return path.with_name(path.name + ".json")


def _read_safetensors(path: Path) -> Checkpoint:
    state, header = read_safetensors(path)
    metadata: dict[str, Any] = {
        "format": "safetensors",
        **{f"header.{key}": value for key, value in header.items()},
    }
    if manifest_path(path).is_file():
        metadata["manifest"] = read_json(manifest_path(path))
        _check_manifest(metadata["manifest"], manifest_path(path))
        _check_digest(path, metadata["manifest"].get("sha256"))
    return Checkpoint(state, metadata)


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest whose values are of other types than `save_detector` writes."""
    for key, (kind, expected) in MANIFEST_TYPES.items():
        value = manifest.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(
                f"{path}: {key} is {shown(value)}, expected {expected}; correct it, or remove the file"
            )
    if manifest.get("names") and _class_names(manifest["names"]) is None:
        raise CheckpointError(
            f"{path}: names are {shown(manifest['names'])}, expected at most {MAX_NAMES} texts of at most {MAX_NAME} "
            "characters; correct them, or remove the file"
        )


def _check_digest(path: Path, expected: Any) -> None:
    """The format itself has no checksum; our manifest has one."""
    if expected is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path} is not the file that {manifest_path(path).name} describes (sha256 {found[:12]}..., expected "
            f"{str(expected)[:12]}...): one of them is damaged or was exchanged; "
            "remove the manifest to load the file anyway"
        )


def _read_torch(archive: TorchArchive) -> Checkpoint:
    content = archive.pickle()
    metadata: dict[str, Any] = {"format": "torch"}
    chosen = content
    if type(content) is dict:
        metadata["epoch"] = content.get("epoch") if type(content.get("epoch")) is int else None
        for entry in ENTRIES_BY_PREFERENCE:
            if isinstance(content.get(entry), Record | dict):
                chosen = content[entry]
                metadata["entry"] = entry
                break
    if isinstance(chosen, Record) and "_modules" not in _attributes(chosen):
        chosen = _attributes(chosen).get("ema", chosen)
    if isinstance(chosen, Record):
        records = dict(_module_tensors(chosen))
        metadata.update(_describe_model(chosen), strides=_strides(archive, chosen))
    elif type(chosen) is dict:
        records = {
            key: value
            for key, value in chosen.items()
            if type(key) is str and isinstance(value, TensorRecord)
        }
    else:
        records = {}
    if not records:
        raise CheckpointError(
            f"{archive.path} holds no model: no module and no tensors at the top or under "
            + ", ".join(ENTRIES_BY_PREFERENCE)
        )
    return Checkpoint(archive.tensors(records), metadata)


def _attributes(record: Record) -> dict[Any, Any]:
    """An object's attributes: its state, if that is a dictionary."""
    return record.state if type(record.state) is dict else {}


def _children(record: Record) -> dict[str, Record]:
    modules = _attributes(record).get("_modules")
    if type(modules) is not dict:
        return {}
    return {key: child for key, child in modules.items() if type(key) is str and isinstance(child, Record)}


def _walk(root: Record) -> Iterator[tuple[str, Record]]:
    """All modules with their dotted paths, parents first.

    Raises:
        CheckpointError: If the tree is deeper than 64, larger than 50,000 modules, or contains itself.
    """
    pending: list[tuple[str, Record, int]] = [("", root, 0)]
    visited = 0
    while pending:
        path, record, depth = pending.pop()
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_MODULES or len(path) > MAX_PATH:
            raise CheckpointError(
                f"The model's modules are nested deeper than {MAX_DEPTH} or number over {MAX_MODULES}, "
                "or contain themselves; refused"
            )
        yield path, record
        prefix = f"{path}." if path else ""
        children = [(prefix + name, child, depth + 1) for name, child in _children(record).items()]
        pending.extend(reversed(children))


def _module_tensors(root: Record) -> Iterator[tuple[str, TensorRecord]]:
    seen = 0
    for path, record in _walk(root):
        attributes = _attributes(record)
        for group in ("_parameters", "_buffers"):
            tensors = attributes.get(group)
            seen += len(tensors) if type(tensors) is dict else 0
            if seen > MAX_TENSORS:
                raise CheckpointError(f"The model has more than {MAX_TENSORS} tensors; refused")
            for name, value in tensors.items() if type(tensors) is dict else ():
                if type(name) is str and isinstance(value, TensorRecord):
                    yield (f"{path}.{name}" if path else name), value


def _describe_model(root: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {"model_class": root.kind, "names": _class_names(_attributes(root).get("names"))}
    behind = {
        path.removesuffix(".act"): child.kind
        for path, child in _walk(root)
        if path.rpartition(".")[2] == "act"
    }
    facts["activated"] = {path: kind != IDENTITY_CLASS for path, kind in behind.items()}
    kinds = set(behind.values()) - {IDENTITY_CLASS}
    epsilons = {
        eps
        for _, child in _walk(root)
        if child.kind == BATCH_NORM_CLASS and isinstance(eps := _attributes(child).get("eps"), float)
    }
    facts["activation_classes"], facts["batch_norm_epsilons"] = sorted(kinds), sorted(epsilons)
    facts["batch_norm_eps"] = epsilons.pop() if len(epsilons) == 1 else None
    facts["activation"] = ACTIVATION_CLASSES.get(kinds.pop()) if len(kinds) == 1 else None
    return facts


def _strides(archive: TorchArchive, root: Record) -> tuple[int, ...] | None:
    """Input pixels per cell of each level, fine to coarse, if the model states them."""
    record = _attributes(root).get("stride")
    if not isinstance(record, TensorRecord):
        return None
    strides = archive.tensors({"stride": record})["stride"].flatten()[:MAX_LEVELS]
    return tuple(int(stride) for stride in strides.tolist() if stride == stride and abs(stride) < MAX_STRIDE)


def _class_names(names: Any) -> tuple[str, ...] | None:
    """Class names from a list, or from a dictionary by index; None if there are none that make sense."""
    if type(names) is dict:
        if len(names) > MAX_NAMES or set(names) != set(range(len(names))):
            return None
        names = [names[index] for index in range(len(names))]
    if (
        type(names) is not list
        or not names
        or len(names) > MAX_NAMES
        or any(type(name) is not str or len(name) > MAX_NAME for name in names)
    ):
        return None
    return tuple(names)
