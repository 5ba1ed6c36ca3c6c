"""Which convolutions NVIDIA's compiler runs in 8 bits: kernels, groups and channels, in INT8 and FP8.

    python benchmarks/compile_convolutions.py [--channels 16,64,256]

Each convolution stands between quantized 1x1 convolutions in a small network, which TensorRT for RTX builds without a
GPU. The table has the precision that the convolution runs in. `core.operators.unsupported_reason` is the rule that came
of it, which placement and check apply: a kind of codes is supported where every GPU runs it, since a plan may be for
all. Lines that the rule does not tell are marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.choices import FP8, INTEGER
from core.operators import unsupported_reason
from deploy import export_onnx, load_onnx
from deploy.compile.report import BuildSummary, inspect_build
from quant import PlacementOptions, calibrate, insert, place, with_named_nodes

BUILDS = ((INTEGER, "SM80"), (INTEGER, "SM89"), (INTEGER, "SM120"), (FP8, "SM89"), (FP8, "SM120"))
EIGHT_BITS = ("int8", "fp8")
SIZE = 64  # side of the images, pixels
DENSE = ((3, 3), (5, 5), (4, 8), (3, 11), (7, 7))
DEPTHWISE = ((3, 3), (5, 5), (4, 8), (3, 11), (6, 6), (7, 7), (9, 9))
STRIDED = ((3, 3), (5, 5), (7, 7))
TRANSPOSED = ((2, 2, 0), (4, 2, 1), (3, 2, 1))  # kernel, stride, padding


class Network(nn.Module):
    """A convolution between others."""

    def __init__(self, middle: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        inside, outside = middle.in_channels, middle.out_channels
        self.stem, self.before = nn.Conv2d(3, inside, 3, 2, 1), nn.Conv2d(inside, inside, 1)
        self.middle, self.after = middle, nn.Conv2d(outside, inside, 1)
        self.last, self.act = nn.Conv2d(inside, 4, 1), nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to maps."""
        x = self.act(self.middle(self.act(self.before(self.act(self.stem(images))))))
        return self.last(self.act(self.after(x)))


def precision_of(middle: nn.Conv2d | nn.ConvTranspose2d, grid: str, capability: str) -> str:
    """Precision that a quantized convolution runs in."""
    torch.manual_seed(0)
    network = Network(middle).eval()
    model = insert(network, place(network, PlacementOptions(grid=grid, quantize_narrow=True))).eval()
    calibrate(model, [torch.rand(1, 3, SIZE, SIZE)])
    named, names = with_named_nodes(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(named, path, (SIZE, SIZE), "tensorrt_rtx", dynamic_batch=False, names=names)
        report = inspect_build(load_onnx(path), capability, fp16=BuildSummary(0, {}, 0))
    return next(layer.precision for layer in report.layers if layer.name == "middle")


def convolutions(channels: Sequence[int]) -> list[tuple[str, nn.Conv2d | nn.ConvTranspose2d]]:
    """What is built, by name."""
    found: list[tuple[str, nn.Conv2d | nn.ConvTranspose2d]] = []
    for count in channels:
        for kind, groups, kernels in (("dense", 1, DENSE), ("depthwise", count, DEPTHWISE)):
            for kernel in kernels:
                padding = (kernel[0] // 2, kernel[1] // 2)
                name = f"{kind} {kernel[0]}x{kernel[1]}, {count} channels"
                found.append((name, nn.Conv2d(count, count, kernel, 1, padding, groups=groups)))
        for size, _ in STRIDED:
            name = f"depthwise {size}x{size}, {count} channels, stride 2"
            found.append((name, nn.Conv2d(count, count, size, 2, size // 2, groups=count)))
        for size, stride, pad in TRANSPOSED:
            layer = nn.ConvTranspose2d(count, count, size, stride, pad)
            found.append((f"transposed {size}x{size}, {count} channels, stride {stride}", layer))
    return found


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", default="16,64,256")
    options = parser.parse_args()
    print(f"| convolution | {' | '.join(f'{grid}, {capability}' for grid, capability in BUILDS)} |")
    print(f"| --- |{' --- |' * len(BUILDS)}")
    differing = 0
    for name, layer in convolutions([int(count) for count in options.channels.split(",")]):
        found = {build: precision_of(layer, *build) for build in BUILDS}
        is_transposed = isinstance(layer, nn.ConvTranspose2d)
        differs = False
        for grid in (INTEGER, FP8):
            runs = all(precision in EIGHT_BITS for (kind, _), precision in found.items() if kind == grid)
            differs |= runs != (unsupported_reason(layer.kernel_size, is_transposed, grid == FP8) is None)
        differing += differs
        print(f"| {name}{' (differs)' if differs else ''} | {' | '.join(found.values())} |", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
