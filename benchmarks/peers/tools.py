"""What the comparisons share: finding a peer, letting it quantize in a separate process, facts of the machine.

Peers are never installed beside Octet. Each has a separate environment, given by `--nncf-python` and
`--modelopt-python` or by the variables OCTET_NNCF_PYTHON and OCTET_MODELOPT_PYTHON:

    python3.11 -m venv peers-nncf && peers-nncf/bin/pip install nncf openvino onnx torch
    python3.11 -m venv peers-modelopt && peers-modelopt/bin/pip install "nvidia-modelopt[onnx]" torch

Two environments, because modelopt wants an older ONNX. Where Octet's own environment has torch already, a line with the
path of its site-packages in `peers-nncf/lib/python3.11/site-packages/octet.pth` saves the second download.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.machine import describe_machine

PEERS = ("nncf", "modelopt")
FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
DECODE = "/decode/.*"  # names of the nodes after the last convs in files of this project
LAST_CONVS = r"head\..*\.output(/WithoutBiases)?"  # OpenVINO adds the suffix to convolutions with a bias
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "nncf": {
        "defaults": (),
        "decode float": ("--ignore", DECODE),
        "last convs float": ("--ignore", DECODE, LAST_CONVS),
    },
    "modelopt": {"defaults": (), "last convs float": ("--ignore", DECODE, LAST_CONVS)},
}
"""What each peer is asked for: arguments of its script. modelopt quantizes no decode by itself."""
GRAPH_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    **VARIANTS,
    "modelopt": {**VARIANTS["modelopt"], "defaults FP16": ("--precision", "fp16")},
    "onnxruntime": {"defaults": ()},
}
"""The same for comparisons of graphs that no CPU has to run."""
TAIL = 2000  # characters of a failed peer's output that are shown


@dataclass(frozen=True)
class Peer:
    """A tool in a separate environment.

    Attributes:
        name: "nncf", "modelopt" or "onnxruntime".
        python: its interpreter.
        version: what it says of itself.
    """

    name: str
    python: str
    version: str

    def quantize(
        self, model: Path, images: NDArray[np.float32], out: Path, arguments: Sequence[str] = ()
    ) -> Path:
        """Quantize `model` with the images [N, 3, H, W] as calibration set; a file that is there already is kept.

        `arguments` are those of the peer's script, see `VARIANTS`.

        Raises:
            SystemExit: the tool failed; with the end of what it printed.
        """
        if out.exists():
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "images.npy"
            np.save(data, images)
            script = FOLDER / f"{self.name}_quantize.py"
            command = [self.python, str(script), str(model.resolve()), str(data), str(out.resolve())]
            result = subprocess.run(
                [*command, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": ""},
                capture_output=True,
                text=True,
                check=False,
            )
        if result.returncode or not out.exists():
            raise SystemExit(f"{self.name} failed on {model}:\n{(result.stdout + result.stderr)[-TAIL:]}")
        return out


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """Add `--nncf-python` and `--modelopt-python`."""
    for name in PEERS:
        variable = f"OCTET_{name.upper()}_PYTHON"
        parser.add_argument(
            f"--{name}-python",
            default=os.environ.get(variable),
            help=f"Python that has {name}; or {variable}",
        )


def find_peers(options: argparse.Namespace, names: Sequence[str] = PEERS) -> dict[str, Peer]:
    """The peers that can be imported; a line for each that cannot."""
    found = {}
    for name in names:
        python = getattr(options, f"{name}_python")
        if python is None:
            print(f"skipped {name}: no --{name}-python")
            continue
        question = f"import importlib, json; print(json.dumps(importlib.import_module('{name}').__version__))"
        result = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"skipped {name}: {python} cannot import it ({reason})")
            continue
        found[name] = Peer(name, python, json.loads(result.stdout.strip().splitlines()[-1]))
    return found


def onnxruntime_peer() -> Peer:
    """ONNX Runtime's own quantizer, which Octet's environment has."""
    return Peer("onnxruntime", sys.executable, version("onnxruntime"))


def circumstances(peers: dict[str, Peer]) -> dict[str, Any]:
    """Machine, commit and versions, for the JSON of a benchmark."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "machine": describe_machine(),
        "peers": {name: peer.version for name, peer in peers.items()},
    }


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write the JSON of a benchmark where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")
