"""What spinning OpenMP threads cost when torch shares its cores: one forward pass, alone and beside busy processes.

Runs itself once for each policy and load, because the policy is read when torch is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUSY = "while True: sum(range(100000))"


def measure_forward() -> float:
    """Seconds of one YOLOv9-t forward pass, batch 8 at 320 pixels, median of five."""
    sys.path.insert(0, str(REPOSITORY))
    import torch

    from models import build_detector, fold_detector

    network = fold_detector(build_detector("yolov9t", 80)).network
    images = torch.rand(8, 3, 320, 320)
    seconds = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.perf_counter()
            network(images)
            seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[2]


def main() -> None:
    """Print one JSON line per policy and load."""
    if len(sys.argv) > 1:
        print(measure_forward())
        return
    for load in (0, 1, 2):
        for policy in ("ACTIVE", "PASSIVE"):
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
            try:
                environment = {**os.environ, "OMP_WAIT_POLICY": policy}
                command = [sys.executable, __file__, "once"]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            finally:
                for process in busy:
                    process.kill()
            record = {"busy_processes": load, "policy": policy, "seconds": round(float(done.stdout), 3)}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
