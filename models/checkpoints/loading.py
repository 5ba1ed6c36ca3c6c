"""Checkpoint file to detector and back."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError
from core.families import SEGMENTERS
from core.files import written_atomically
from core.names import listing
from models.blocks import ACTIVATIONS
from models.checkpoints.convert import build_empty
from models.checkpoints.interpretation import interpret
from models.checkpoints.reading import Checkpoint, manifest_path, read_checkpoint
from models.checkpoints.statements import check_kinds, check_statements
from models.detector import Detector, placeholder_names
from models.heads import REG_MAX

MANIFEST_FORMAT = "octet-detector-1"
_logger = logging.getLogger(__name__)


def load_detector(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    activation: str | None = None,
) -> Detector:
    """Load a detector from any checkpoint that `read_checkpoint` reads, as float32, in evaluation mode.

    Args:
        path: The weights file.
        architecture: What it must be; recognised by its keys and shapes when None.
        num_classes: K it must have; not checked when None.
        activation: `silu` or `relu`; when None what the file says, and SiLU (logged) if it says nothing.

    Returns:
        A detector, unfolded if the file has batch normalisation, folded if it was stored so.

    Raises:
        CheckpointError: If the file can't be read or doesn't fit what is asked for.
        ValueError: If the architecture or activation asked for is unknown.
    """
    return detector_from_checkpoint(read_checkpoint(path), str(path), architecture, num_classes, activation)


def find_task(path: str | Path) -> str:
    """What a checkpoint's network does, by its keys and shapes: `detect` or `segment`.

    Raises:
        CheckpointError: If the file can't be read or fits no known network.
    """
    architecture = interpret(read_checkpoint(path), str(path)).match.architecture
    return "segment" if architecture in SEGMENTERS else "detect"


def find_head(path: str | Path) -> str:
    """The head that a checkpoint deploys: `one2one` where its network has that head and nothing else was said.

    Raises:
        CheckpointError: If the file can't be read or fits no known network.
    """
    checkpoint = read_checkpoint(path)
    meaning = interpret(checkpoint, str(path))
    detector = build_empty(
        meaning.match.architecture,
        meaning.num_classes,
        "silu",
        meaning.match.folded,
        meaning.match.head_style,
    )
    return str(checkpoint.metadata.get("manifest", {}).get("head") or detector.deployed_head)


def find_names(path: str | Path) -> tuple[str, ...] | None:
    """Class names that a checkpoint states; None where it names none.

    Raises:
        CheckpointError: If the file can't be read.
    """
    metadata = read_checkpoint(path).metadata
    names = metadata.get("manifest", {}).get("names") or metadata.get("names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else None


def detector_from_checkpoint(
    checkpoint: Checkpoint,
    source: str,
    architecture: str | None = None,
    num_classes: int | None = None,
    activation: str | None = None,
) -> Detector:
    """Build the detector that a checkpoint's keys and shapes describe; arguments and errors as for `load_detector`."""
    meaning = interpret(checkpoint, source, architecture)
    match, state = meaning.match, meaning.state
    manifest = checkpoint.metadata.get("manifest", {})
    names = _choose_names(checkpoint.metadata, manifest, meaning.num_classes, source)
    if num_classes is not None and num_classes != len(names):
        raise CheckpointError(
            f"{source} has {len(names)} classes ({listing(names, 12)}); {num_classes} are expected: "
            "use weights and data of the same classes"
        )
    check_kinds(checkpoint.metadata, source)
    chosen = _choose_activation(checkpoint.metadata, manifest, activation, source)
    detector = build_empty(match.architecture, len(names), chosen, match.folded, match.head_style)
    detector.names, detector.amax = names, meaning.amax
    if (head := manifest.get("head")) in detector.heads:
        detector.deploy_head(head)
    check_statements(detector, checkpoint.metadata, meaning.conversion, source)
    _set_batch_norm_eps(
        detector, manifest.get("batch_norm_eps") or checkpoint.metadata.get("batch_norm_eps"), source
    )
    values: dict[str, Tensor] = {
        ours: state[theirs].to(torch.float32) if state[theirs].is_floating_point() else state[theirs]
        for ours, theirs in match.keys.items()
    }
    for key, empty in detector.state_dict().items():
        if key == "decode.projection":
            values[key] = torch.arange(REG_MAX, dtype=torch.float32)
        elif key.endswith("num_batches_tracked"):
            values.setdefault(key, torch.zeros((), dtype=empty.dtype))
    check_finite(values, source)
    detector.load_state_dict(values, assign=True)
    _logger.info(
        "%s: %s, %d classes, %s, %d tensors", source, match.architecture, len(names), chosen, len(values)
    )
    return detector.eval()


def save_detector(detector: Detector, path: str | Path) -> None:
    """Write the weights as `.safetensors` and what they are as JSON next to it; both are written or neither.

    Args:
        detector: The detector; its tensors keep their type; imported quantizer ranges are kept too.
        path: Ends with `.safetensors`. The manifest is `PATH.json`.

    Raises:
        ValueError: If the path has another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Detectors are saved as .safetensors, not {path.name!r}")
    manifest = {
        "format": MANIFEST_FORMAT,
        "architecture": detector.architecture,
        "num_classes": detector.num_classes,
        "names": list(detector.names),
        "activation": detector.activation,
        "head_style": detector.head_style,
        "head": detector.deployed_head,
        "folded": detector.folded,
        "batch_norm_eps": next((norm.eps for norm in _batch_norms(detector)), None),
    }
    tensors = {**detector.state_dict(), **{f"amax.{key}": tensor for key, tensor in detector.amax.items()}}
    with written_atomically(manifest_path(path), path) as (manifest_part, weights_part):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, weights_part)
        with weights_part.open("rb") as stream:
            manifest["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        manifest_part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _batch_norms(detector: Detector) -> list[nn.BatchNorm2d]:
    return [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]


def _set_batch_norm_eps(detector: Detector, eps: Any, source: str) -> None:
    """Use the file's eps, where it says one; ours is that of all official checkpoints."""
    if eps is None:
        return
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise CheckpointError(
            f"{source} states a normalisation eps of {eps!r}; expected a number between 0 and 1"
        )
    for norm in _batch_norms(detector):
        norm.eps = eps


def _choose_names(
    metadata: Mapping[str, Any],
    manifest: Mapping[str, Any],
    num_classes: int,
    source: str,
) -> tuple[str, ...]:
    names = manifest.get("names") or metadata.get("names")
    if names is None:
        return placeholder_names(num_classes)
    if (
        not isinstance(names, list | tuple)
        or any(not isinstance(name, str) for name in names)
        or len(names) != num_classes
    ):
        raise CheckpointError(
            f"{source} names {len(names)} classes and its class branch has {num_classes}; the file is inconsistent"
        )
    return tuple(names)


def _choose_activation(
    metadata: Mapping[str, Any], manifest: Mapping[str, Any], activation: str | None, source: str
) -> str:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"Activation {activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    stated = manifest.get("activation") or metadata.get("activation")
    if stated is not None and stated not in ACTIVATIONS:
        raise CheckpointError(
            f"{source} states activation {stated!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if stated is not None and activation not in (None, stated):
        raise CheckpointError(
            f"{source} was trained with {stated}, not {activation}: leave the activation out or set it to {stated}"
        )
    if stated is None and activation is None:
        _logger.warning("%s does not state its activation; SiLU is assumed", source)
    return str(stated or activation or "silu")


def check_finite(values: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckpointError: If there is any; names the tensors.
    """
    broken = [
        key
        for key, tensor in values.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if broken:
        raise CheckpointError(
            f"{source}: not all numbers are finite in {listing(broken, 6)}; the file is damaged or training diverged"
        )
