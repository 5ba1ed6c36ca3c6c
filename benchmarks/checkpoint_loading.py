"""Time and memory that loading a checkpoint takes, each file in a separate process.

    python benchmarks/checkpoint_loading.py [FILE ...] [--architectures yolo11n yolo11x]

Architectures stand for random weights under the names and in the half precision of Ultralytics' files. Memory is what
the process holds at most, less what it holds after the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20
LOAD = """
import json, sys, time
from models import load_detector
from benchmarks.checkpoint_loading import peak_bytes
before = peak_bytes()
start, cpu = time.perf_counter(), time.process_time()
architecture = load_detector(sys.argv[1]).architecture
print(json.dumps([architecture, time.perf_counter() - start, time.process_time() - cpu, peak_bytes() - before]))
"""


def peak_bytes() -> int:
    """Largest resident memory of this process; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def write_checkpoint(architecture: str, folder: Path) -> Path:
    """Random weights of an architecture at 80 classes, as a state dict in half precision."""
    import torch

    from models import build_detector
    from models.checkpoints.convert import official_name

    network = build_detector(architecture, 80).network
    path = folder / f"{architecture}.pt"
    torch.save(
        {f"model.{official_name(network, key)}": value.half() for key, value in network.state_dict().items()},
        path,
    )
    return path


def main() -> None:
    """Load each file and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--architectures", nargs="*", default=["yolo11n", "yolo11x"])
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    print("| file | network | MB | seconds | of CPU | peak MiB |\n| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        made = [write_checkpoint(architecture, Path(folder)) for architecture in options.architectures]
        for path in [*options.files, *made]:
            command = [sys.executable, "-c", LOAD, str(path.resolve())]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
            architecture, seconds, cpu, peak = json.loads(done.stdout.splitlines()[-1])
            size = path.stat().st_size / 1e6
            figures = f"{size:.1f} | {seconds:.2f} | {cpu:.2f} | {peak / MEBIBYTE:.0f}"
            print(f"| {path.name} | {architecture} | {figures} |")


if __name__ == "__main__":
    main()
