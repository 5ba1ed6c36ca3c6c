"""CPU seconds that a command takes to start, and which large libraries it imports.

    python benchmarks/startup.py [--run RUN --weights FILE --image FILE] [--rounds 3]

Every command runs in a separate process, with one OpenMP thread. The figure is the least of the rounds, user and
system time together. With a finished run, its float weights and a picture, real predictions are timed, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch",
    "torchvision",
    "torch._dynamo",
    "hydra",
    "onnx",
    "cv2",
    "openvino",
    "onnxruntime",
    "rich",
)
COMMANDS = (
    "-c pass",
    "-c import(torch)",
    "-c import(torchvision)",
    "train_qat.py --help",
    "train_qat.py --cfg job +experiment=demo",
    "export.py --help",
    "-m pipeline.predict --help",
    "-m pipeline.evaluate --help",
    "-m data --help",
    "-m deploy.check --help",
    "-m deploy.benchmark --help",
)
REAL = (
    "-m deploy.check {run}/model.onnx",
    "-m pipeline.predict {run}/engines/model.xml {image} --out {out}",
    "-m pipeline.predict {run}/engines/float.onnx {image} --runtime onnxruntime --out {out}",
    "-m pipeline.predict {weights} {image} --size 320 --out {out}",
)


def measure(command: str) -> float:
    """CPU seconds of one process."""
    arguments = [word.replace("import(", "import ").rstrip(")") for word in command.split(" ")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr[-500:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def imported(command: str) -> list[str]:
    """The large libraries that a command imports, as `-X importtime` lists them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    arguments = [word.replace("import(", "import ").rstrip(")") for word in command.split(" ")]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    return [name for name in LIBRARIES if name in names]


def main() -> None:
    """Print one line of a Markdown table for each command."""
    parser = argparse.ArgumentParser(description="CPU seconds of starting a command.")
    parser.add_argument(
        "--run", type=Path, help="a finished run with an OpenVINO engine, for real predictions"
    )
    parser.add_argument("--weights", type=Path, help="a float checkpoint")
    parser.add_argument("--image", type=Path, help="the picture of the predictions")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| command | CPU seconds | imports |\n| --- | ---: | --- |")
    with TemporaryDirectory() as out:
        commands = {command: command for command in COMMANDS}
        given = {"run": options.run, "weights": options.weights, "image": options.image}
        if None not in given.values():
            paths = {name: path.resolve() for name, path in given.items()} | {"out": out}
            shown = {name: name.upper() for name in paths}
            commands |= {command.format(**shown): command.format(**paths) for command in REAL}
        for label, command in commands.items():
            seconds = min(measure(command) for _ in range(options.rounds))
            print(f"| `{label}` | {seconds:.2f} | {', '.join(imported(command))} |", flush=True)


if __name__ == "__main__":
    main()
