r"""What `deploy.check` says about Q/DQ graphs of five tools for one network.

    python benchmarks/check_peers.py [--weights W.pt] [--architecture yolov9t] [--size 320] [--images 8] \
        --nncf-python PYTHON --modelopt-python PYTHON [--folder FOLDER] [--json FILE]

Octet, NNCF, modelopt, ONNX Runtime's quantize_static, and a naive graph (`peers/naive.py`). Findings depend on where
quantizers are and which scales are equal, not on accuracy, so random weights and a few random images suffice; --data
FOLDER calibrates with the training images of a dataset. Peers run with their defaults, and with parts left float
(`GRAPH_VARIANTS` in `peers/tools.py`, which also tells how to make their environments); peers that are not there are
skipped. With --folder the graphs are kept, and reused by the next call. The verified examples in RESULTS.md were looked
up in graphs of this script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.naive import Whole, export_naive
from benchmarks.peers.tools import (
    GRAPH_VARIANTS,
    add_peer_options,
    circumstances,
    find_peers,
    onnxruntime_peer,
    write_result,
)
from data import build_loader, open_dataset, to_input
from deploy import TARGETS, CheckReport, export_onnx, inspect_graph
from models import Detector, build_detector, fold_detector, load_detector
from quant import Mode, calibrate, insert, place, set_mode


def main() -> int:
    """Print the table; returns the exit code."""
    options = parser().parse_args()
    peers = find_peers(options)
    if not peers:
        print("skipped: this comparison needs a peer")
        return 0
    torch.manual_seed(0)
    size = (options.size, options.size)
    images = calibration_images(options.data, options.size, options.images)
    detector = fold_detector(
        load_detector(options.weights) if options.weights else build_detector(options.architecture, 80)
    ).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        graphs = write_ours(detector, images, size, folder)
        floating, naive = folder / "float.onnx", folder / "naive.onnx"
        if not naive.exists():
            export_naive(detector.network, detector.decode, images.split(1), naive, size)
        graphs["naive, one module at a time"] = naive
        for peer in (*peers.values(), onnxruntime_peer()):
            for variant, arguments in GRAPH_VARIANTS[peer.name].items():
                out = folder / f"{peer.name}-{variant.replace(' ', '-')}.onnx"
                graphs[f"{peer.name}, {variant}"] = peer.quantize(floating, images.numpy(), out, arguments)
        reports = {name: inspect_graph(path) for name, path in graphs.items()}
    print_table(reports)
    result = {name: report.as_dict() for name, report in reports.items()}
    write_result(options.json, {**circumstances(peers), "checks": result})
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_options(made)
    made.add_argument("--weights", type=Path, help="checkpoint; random weights without one")
    made.add_argument("--architecture", default="yolov9t", help="for random weights")
    made.add_argument("--data", type=Path, help="dataset to calibrate with; random images without one")
    made.add_argument("--size", type=int, default=320)
    made.add_argument("--images", type=int, default=8)
    made.add_argument("--folder", type=Path, help="keep the graphs here")
    made.add_argument("--json", type=Path)
    return made


def calibration_images(data: Path | None, size: int, count: int) -> torch.Tensor:
    """Letterboxed training images, or noise: float32 [N, 3, H, W] in [0, 1]."""
    if data is None:
        return torch.rand(count, 3, size, size)
    loader = build_loader(open_dataset(data, "train"), size, 1, limit=count)
    return torch.cat([to_input(batch.images, torch.device("cpu")) for batch in loader])


def write_ours(
    detector: Detector, images: torch.Tensor, size: tuple[int, int], folder: Path
) -> dict[str, Path]:
    """The float graph, and Octet's INT8 graph for every target."""
    floating = folder / "float.onnx"
    whole = Whole(detector.network, detector.decode).eval()
    if not floating.exists():
        export_onnx(whole, floating, size, "openvino", quantized=False, dynamic_batch=False)
    network = insert(detector.network, place(detector.network))
    with torch.no_grad():
        calibrate(network, images.split(1))
    set_mode(network, Mode.QUANTIZE)
    quantized = Whole(network, detector.decode).eval()
    return {
        f"octet, {target}": export_onnx(
            quantized,
            folder / f"octet-{target}.onnx",
            size,
            target,
            dynamic_batch=False,
            images=[image.numpy() for image in images.split(1)],
        ).path
        for target in TARGETS
    }


def print_table(reports: dict[str, CheckReport]) -> None:
    """Summaries as a Markdown table, then the findings counted by rule."""
    print(
        "\n| graph | findings | convs in INT8 | MACs in INT8, backbone and neck and towers | precision changes |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, report in reports.items():
        found = report.summary
        share = "unknown" if found.inner_int8_share is None else f"{found.inner_int8_share:.2%}"
        print(
            f"| {name} | {len(report.findings)} | {found.num_int8_convs} of {found.num_convs} | "
            f"{share} | {found.precision_changes} |"
        )
    print()
    for name, report in reports.items():
        counts = Counter(finding.rule for finding in report.findings)
        print(f"{name}: " + (", ".join(f"{rule} {n}" for rule, n in counts.most_common()) or "no findings"))


if __name__ == "__main__":
    sys.exit(main())
