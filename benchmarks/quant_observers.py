"""Times calibration: counting values, the share of counting in a calibration pass, and choosing the scales.

Usage: python benchmarks/quant_observers.py [--architecture yolov9t] [--size 320] [--batch 8] [--threads 1] [--device D]

`torch.histc` on magnitudes, the obvious way to count, is timed beside ours. Times are processor time on a CPU (so that
other work on the machine counts little) and wall time on a GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from core.choices import OBSERVERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_detector, fold_detector
from quant import insert, place
from quant.calibration import calibrate as calibration
from quant.calibration import observers


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Least time of several runs, after one that warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    work()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def count_with_histc(values: Tensor) -> Tensor:
    """What a histogram of magnitudes costs with torch's own: three sweeps over memory, float32 counts."""
    magnitudes = values.abs().flatten()
    return torch.histc(magnitudes, observers.BINS, 0.0, float(magnitudes.max())).double().cpu()


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="yolov9t")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)

    values = torch.nn.functional.silu(torch.randn(8, 64, 80, 80, device=device))
    for name, count in (
        ("torch.histc", count_with_histc),
        ("Histogram.update", lambda x: observers.Histogram().update(x)),
    ):
        nanoseconds = seconds(partial(count, values), device) / values.numel() * 1e9
        print(f"{name:<22} {nanoseconds:6.2f} ns per value")

    network = fold_detector(build_detector(options.architecture, 80)).network.to(device).eval()
    model = insert(network, place(network))
    images = torch.rand(options.batch, 3, options.size, options.size, device=device)
    with torch.no_grad():
        alone = seconds(lambda: model(images), device, 3)
    collected = seconds(lambda: calibration.collect_histograms(model, [images]), device, 3)
    histograms, num_images = calibration.collect_histograms(model, [images])
    num_values = sum(histogram.num_values for histogram in histograms.values())
    print(
        f"one batch of {options.batch} x {options.size} px, {options.architecture}: inference {alone:.2f} s, with "
        f"counting {collected:.2f} s ({num_values / 1e6:.0f} M values in {len(histograms)} groups)"
    )
    for method in OBSERVERS:
        taken = seconds(
            partial(calibration.apply_histograms, model, histograms, method, 99.99, num_images),
            torch.device("cpu"),
            2,
        )
        print(f"scales of all groups by {method:<10} {taken:6.3f} s")
    taken = seconds(lambda: calibration.calibrate_weights(model, "mse"), device, 2)
    print(f"scales of all weights by mse    {taken:6.3f} s")


if __name__ == "__main__":
    main()
