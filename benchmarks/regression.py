"""Compares the speed of this checkout with the committed ratios, and fails where a work has become slower.

    python benchmarks/regression.py [--write] [--margin 0.15]

`make bench` runs it; it takes a few minutes of processor time. Measured are the step of fine-tuning and evaluation
(training_step.py), calibration and sensitivity (passes.py), starting commands (startup.py, in units of `import torch`)
and the loader (in units of decoding the same pictures), with few rounds. Each figure is a ratio of processor times in
one process or of processes that ran one after the other, so that the load of the machine counts little; the processor
itself does count.

A work has become slower where its median is above the largest committed round by more than the margin, which covers
what other jobs on the machine do to ratios. Exit code 1: a work has become slower, or a committed one was not measured.
`--write` measures and replaces benchmarks/ratios.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from benchmarks import startup
from benchmarks.data_loader import time_loader
from core.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("ratios.json")
STEPS = "QAT step, channels-last,quantized evaluation, channels-last"
COMMANDS = (
    "train_qat.py --cfg job +experiment=demo",
    "-m pipeline.predict --help",
    "-m deploy.check --help",
)
Ratios = dict[str, dict[str, float]]  # work -> ratio (the median), least and largest


def compare(committed: Mapping[str, Mapping[str, float]], measured: Ratios, margin: float) -> list[str]:
    """What has become slower, or was not measured, one line each; empty where nothing has.

    Args:
        committed: ratio, least and largest by work.
        measured: the same of now; works that are not committed are left out.
        margin: by how much the median may be above the largest committed round, as a share of it.
    """
    found = []
    for name, before in committed.items():
        now = measured.get(name)
        if now is None:
            found.append(f"{name}: no longer measured; run benchmarks/regression.py --write")
        elif now["ratio"] > before["largest"] * (1 + margin):
            found.append(
                f"{name}: {now['ratio']:.2f}, committed {before['ratio']:.2f} "
                f"({before['least']:.2f} to {before['largest']:.2f}), margin {margin:.0%}"
            )
    return found


def describe(ratios: list[float]) -> dict[str, float]:
    """Median, least and largest of the rounds."""
    return {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def of_script(name: str, *arguments: str) -> Ratios:
    """The table of a benchmark script that writes JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        command = [sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        table: Ratios = json.loads(path.read_text())
    keys = ("ratio", "least", "largest")
    return {f"{Path(name).stem}: {work}": {key: row[key] for key in keys} for work, row in table.items()}


def of_startup(rounds: int = 2) -> Ratios:
    """CPU seconds of commands in units of `import torch`."""
    taken: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(rounds):
        unit = startup.measure("-c import(torch)")
        for command, ratios in taken.items():
            ratios.append(startup.measure(command) / unit)
    return {f"startup: {command}": describe(ratios) for command, ratios in taken.items()}


def of_loader(rounds: int = 2) -> Ratios:
    """Processor time of loading an image in units of decoding its file."""
    taken: dict[str, list[float]] = {"letterbox": [], "augmented": []}
    with tempfile.TemporaryDirectory() as folder:
        root = data.generate_synthetic(Path(folder) / "set", 64, 1, 320, 0)
        dataset = data.open_dataset(root, "train")
        for _ in range(rounds):
            start = time.process_time()
            for record in dataset.records:
                cv2.imread(str(record.path))
            unit = (time.process_time() - start) / len(dataset)
            for name, ratios in taken.items():
                ratios.append(1 / time_loader(dataset, 320, 16, 0, name == "augmented") / unit)
    return {f"loader: {name}": describe(ratios) for name, ratios in taken.items()}


def measure() -> Ratios:
    """Every ratio."""
    parts: tuple[Callable[[], Ratios], ...] = (
        lambda: of_script("training_step.py", "--rounds", "2", "--only", STEPS),
        lambda: of_script("passes.py", "--rounds", "2", "--num-images", "8"),
        of_startup,
        of_loader,
    )
    return {name: row for part in parts for name, row in part().items()}


def main(arguments: list[str]) -> int:
    """Print every ratio next to the committed one; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the committed ratios")
    parser.add_argument("--margin", type=float, default=0.15)
    options = parser.parse_args(arguments)
    processor, measured = describe_machine()["processor"], measure()
    if options.write:
        FILE.write_text(json.dumps({"processor": processor, "ratios": measured}, indent=1) + "\n")
        print(f"{len(measured)} ratios written to {FILE.name}")
        return 0
    committed = json.loads(FILE.read_text())
    if committed["processor"] != processor:
        print(f"the ratios were written on {committed['processor']}, this is {processor}: they may differ")
    for name, row in measured.items():
        before = committed["ratios"].get(name)
        reference = f"{before['ratio']:6.2f}" if before else "     -"
        print(f"{name:<64} {row['ratio']:6.2f} {reference}")
    slower = compare(committed["ratios"], measured, options.margin)
    for line in slower:
        print(f"slower: {line}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
