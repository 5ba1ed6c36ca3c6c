"""The JSON file beside an engine of TensorRT, as a build writes it; it may have been edited or exchanged since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.documents import DocumentError, read_json, shown
from core.errors import DeployError
from deploy.runtimes.tensorrt_builder import sidecar_path

SIDECAR_TYPES = {
    "precision": str, "gpu": str, "tensorrt": str, "tensorrt_rtx": str, "engine_sha256": str, "metadata": dict,
    "capabilities": list, "compiled": list,
}  # fmt: skip


def read_sidecar(path: Path) -> dict[str, Any]:
    """What an engine's sidecar says, with values of the types that a build writes.

    Raises:
        DeployError: it is missing, damaged, or was changed.
    """
    sidecar_file = sidecar_path(path)
    try:
        sidecar = read_json(sidecar_file)
    except (OSError, DocumentError) as error:
        raise DeployError(f"{sidecar_file} cannot be read ({error}); build the engine again.") from error
    problem = "" if isinstance(sidecar, dict) else f"it is {shown(sidecar)}, expected an object"
    for key, kind in SIDECAR_TYPES.items() if not problem else ():
        if not isinstance(sidecar.get(key, kind()), kind):
            problem = f"{key} is {shown(sidecar[key])}, expected a {kind.__name__}"
    if not problem and any(not isinstance(value, str) for value in sidecar.get("metadata", {}).values()):
        problem = "metadata are not texts by name"
    if not problem and any(not isinstance(value, str) for value in sidecar.get("capabilities", [])):
        problem = "capabilities are not a list of strings"
    if problem:
        raise DeployError(
            f"{sidecar_file} is not an engine's description ({problem}); build the engine again."
        )
    return sidecar
