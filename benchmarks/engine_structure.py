r"""Equal graphs in another form: does a CPU engine run them faster?

    python benchmarks/engine_structure.py [--architecture yolov9t] [--size 320] [--seconds 3] [--runtime openvino]

Each variant of the INT8 graph computes the same integers, or the same floats but for the order of sums:

- `dense`: grouped convolutions as dense ones, the weights between groups 0;
- `stem`: the first convolution, 3 x 3 with stride 2 over 3 channels, as 2 x 2 over the 12 channels of SpaceToDepth;
- `slices`: each AveragePool of 2 x 2 with stride 1 as the mean of four slices;
- `depthwise`: the same AveragePools as depthwise convolutions with weights 1/4 (the graph for ONNX Runtime has them
  already; there `averages` is the reverse);
- `relu`, `hardswish` (not equal): SiLU replaced, which bounds what a faster SiLU can gain.

Random weights cost the same time as trained ones. All engines run alternately with one thread; the time is processor
time, so that other work on the machine slows an engine only through caches. Printed are the largest difference to the
graph as it is, the median time, and the median of the ratios of the rounds with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compare_engines import build_octet, call_times
from deploy import ONNXRuntime, OpenVINORuntime, Runtime, load_onnx, save_onnx
from deploy.graph.model import tensor_shapes
from models import build_detector, fold_detector, swap_activation
from quant import PlacementOptions

RUNTIMES: dict[str, Callable[[Path], Runtime]] = {
    "openvino": lambda path: OpenVINORuntime(path, "f32", threads=1, batch=1),
    "onnxruntime": lambda path: ONNXRuntime(path, threads=1),
}


def main() -> None:
    """Build, check and time the variants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="yolov9t")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--runtime", choices=RUNTIMES, default="openvino")
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time for each engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {
            **write_variants(options.architecture, "silu", options.size, options.runtime, folder),
            **write_others(options.architecture, options.size, options.runtime, folder),
        }
        engines = {variant: RUNTIMES[options.runtime](path) for variant, path in paths.items()}
        images = np.random.default_rng(1).random((1, 3, options.size, options.size), dtype=np.float32)
        results = {variant: engine.infer_outputs(images) for variant, engine in engines.items()}
        times = call_times(engines, images, options.seconds)
    print("| variant | largest difference | median ms | ratio (quartiles) |\n| --- | ---: | ---: | ---: |")
    for variant, spent in times.items():
        equal = variant in EQUAL or variant == PLAIN
        difference = f"{max_difference(results[variant], results[PLAIN]):.2g}" if equal else "another network"
        low, middle, high = np.percentile(np.divide(spent, times[PLAIN]), (25, 50, 75))
        print(
            f"| {variant} | {difference} | {1000 * np.median(spent):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )


PLAIN = "as exported"


def write_variants(
    architecture: str, activation: str, size: int, runtime: str, folder: Path
) -> dict[str, Path]:
    """The INT8 graph as it is and each equal variant: name -> file."""
    path = export(architecture, activation, size, runtime, folder)
    paths = {PLAIN: path}
    for name, rewrite in EQUAL.items():
        model = load_onnx(path)
        count = rewrite(model)
        print(f"{name}: {count} nodes replaced")
        if count:
            paths[name] = folder / f"{name}.onnx"
            save_onnx(model, paths[name])
    return paths


def write_others(architecture: str, size: int, runtime: str, folder: Path) -> dict[str, Path]:
    """The same network with cheaper activations: name -> file."""
    names = ("relu", "hardswish") if runtime == "openvino" else ("relu",)
    return {name: export(architecture, name, size, runtime, folder) for name in names}


def export(architecture: str, activation: str, size: int, runtime: str, folder: Path) -> Path:
    """The network with random weights, calibrated on random images, as the job exports it for a runtime."""
    torch.manual_seed(0)
    detector = fold_detector(build_detector(architecture, 80)).eval()
    if activation != "silu":
        detector.network = swap_activation(detector.network, activation)
    build_octet(detector, torch.rand(2, 3, size, size), PlacementOptions(), folder, activation, [runtime])
    return folder / f"{activation}-{runtime}.onnx"


def max_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest difference of all outputs."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in other)


# ------------------------------------------------------------------------------------------ rewriting graphs
def attributes(node: NodeProto) -> dict[str, AttributeProto]:
    """Attributes by name."""
    return {attribute.name: attribute for attribute in node.attribute}


def replace_weight(model: ModelProto, conv: NodeProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give one convolution changed codes (or floats, if it has no quantized weight) of its own."""
    makers = {name: node for node in model.graph.node for name in node.output}
    maker = makers.get(conv.input[1])
    holder, index = (maker, 0) if maker is not None else (conv, 1)
    stored = next(t for t in model.graph.initializer if t.name == holder.input[index])
    tensor = numpy_helper.from_array(
        np.ascontiguousarray(change(numpy_helper.to_array(stored))), f"{stored.name}.new"
    )
    model.graph.initializer.append(tensor)
    holder.input[index] = tensor.name


def dense(model: ModelProto) -> int:
    """Write the weights of grouped, not depthwise, convolutions with zeros between the groups."""
    convs = [n for n in model.graph.node if n.op_type == "Conv" and attributes(n)["group"].i > 1]
    shapes = tensor_shapes(model)
    found = [n for n in convs if shapes[n.input[1]][1] != 1]
    count = 0
    for conv in found:
        groups = attributes(conv)["group"].i

        def spread(weight: np.ndarray, groups: int = groups) -> np.ndarray:
            outputs, inputs = weight.shape[0] // groups, weight.shape[1]
            whole = np.zeros((weight.shape[0], inputs * groups, *weight.shape[2:]), weight.dtype)
            for g in range(groups):
                rows = slice(g * outputs, (g + 1) * outputs)
                whole[rows, g * inputs : (g + 1) * inputs] = weight[rows]
            return whole

        replace_weight(model, conv, spread)
        attributes(conv)["group"].i = 1
        count += 1
    return count


def stem(model: ModelProto) -> int:
    """The 3 x 3 convolution with stride 2 that reads the image, on blocks of 2 x 2 pixels.

    Output (i, j) reads rows 2i - 1 to 2i + 1, which lie in the blocks i - 1 and i: a kernel of 2 x 2 blocks with
    padding on the left and the top only, where row 0 of block i - 1 has weight 0.
    """
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    kind = attributes(conv)
    if list(kind["kernel_shape"].ints) != [3, 3] or list(kind["strides"].ints) != [2, 2]:
        return 0

    def blocks(weight: np.ndarray) -> np.ndarray:
        outputs, channels = weight.shape[:2]
        whole = np.zeros((outputs, channels, 4, 4), weight.dtype)
        whole[:, :, 1:, 1:] = weight
        # channel of a block = (row in the block * 2 + column in the block) * channels + channel
        parts = whole.reshape(outputs, channels, 2, 2, 2, 2).transpose(0, 3, 5, 1, 2, 4)
        return parts.reshape(outputs, 4 * channels, 2, 2)

    replace_weight(model, conv, blocks)
    kind["kernel_shape"].ints[:] = [2, 2]
    kind["strides"].ints[:] = [1, 1]
    kind["pads"].ints[:] = [1, 1, 0, 0]
    reader = next(n for n in model.graph.node if n.input[0] == model.graph.input[0].name)
    images = reader.input[0]
    position = list(model.graph.node).index(reader)
    reader.input[0] = f"{images}.blocks"
    model.graph.node.insert(
        position, helper.make_node("SpaceToDepth", [images], [reader.input[0]], blocksize=2, name="blocks")
    )
    del model.graph.value_info[:]
    return 1


def slices(model: ModelProto) -> int:
    """Each AveragePool of 2 x 2, stride 1, without padding, as a quarter of the sum of four shifted tensors."""
    pools = small_pools(model)
    quarter = numpy_helper.from_array(np.array(0.25, np.float32), "octet.quarter")
    bounds = {0: [0, -1], 1: [1, 2**31 - 1]}
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "octet.axes")
    model.graph.initializer.extend([quarter, axes])
    for name, (x, y) in {"00": (0, 0), "01": (1, 0), "10": (0, 1), "11": (1, 1)}.items():
        for part, index in (("starts", 0), ("ends", 1)):
            values = np.array([bounds[y][index], bounds[x][index]], np.int64)
            model.graph.initializer.append(numpy_helper.from_array(values, f"octet.{part}{name}"))
    for pool in pools:
        position, source, result = list(model.graph.node).index(pool), pool.input[0], pool.output[0]
        model.graph.node.remove(pool)
        made = [
            helper.make_node(
                "Slice", [source, f"octet.starts{n}", f"octet.ends{n}", "octet.axes"], [f"{result}.{n}"]
            )
            for n in ("00", "01", "10", "11")
        ]
        made += [
            helper.make_node("Add", [f"{result}.00", f"{result}.01"], [f"{result}.top"]),
            helper.make_node("Add", [f"{result}.10", f"{result}.11"], [f"{result}.bottom"]),
            helper.make_node("Add", [f"{result}.top", f"{result}.bottom"], [f"{result}.sum"]),
            helper.make_node("Mul", [f"{result}.sum", "octet.quarter"], [result]),
        ]
        for offset, node in enumerate(made):
            model.graph.node.insert(position + offset, copy.deepcopy(node))
    return len(pools)


def depthwise(model: ModelProto) -> int:
    """Each AveragePool of 2 x 2, stride 1, as a depthwise convolution with codes 1 and scale 1/4."""
    shapes = tensor_shapes(model)
    pools = small_pools(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.25, np.float32), "octet.quarter"))
    for pool in pools:
        position, source, result = list(model.graph.node).index(pool), pool.input[0], pool.output[0]
        model.graph.node.remove(pool)
        codes = np.ones((shapes[result][1] or 0, 1, 2, 2), np.int8)
        model.graph.initializer.append(numpy_helper.from_array(codes, f"{result}.codes"))
        nodes = [
            helper.make_node("DequantizeLinear", [f"{result}.codes", "octet.quarter"], [f"{result}.weight"]),
            helper.make_node(
                "Conv", [source, f"{result}.weight"], [result], group=len(codes), kernel_shape=[2, 2]
            ),
        ]
        for offset, node in enumerate(nodes):
            model.graph.node.insert(position + offset, node)
    return len(pools)


def averages(model: ModelProto) -> int:
    """The reverse, for the target onnxruntime, whose graph has such convolutions: each as an AveragePool again."""
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for conv in [node for node in model.graph.node if node.op_type == "Conv"]:
        maker = makers.get(conv.input[1])
        codes = stored.get(maker.input[0]) if maker is not None else None
        if codes is None or codes.dims[1] != 1 or not (numpy_helper.to_array(codes) == 1).all():
            continue
        conv.op_type = "AveragePool"
        del conv.input[1:]
        conv.attribute.remove(attributes(conv)["group"])
        count += 1
    return count


def small_pools(model: ModelProto) -> list[NodeProto]:
    """AveragePool nodes of 2 x 2 with stride 1 and without padding."""
    pools = [node for node in model.graph.node if node.op_type == "AveragePool"]
    wanted = {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 0, 0, 0]}
    return [n for n in pools if all(list(attributes(n)[k].ints) == v for k, v in wanted.items())]


EQUAL: dict[str, Callable[[ModelProto], int]] = {
    "dense": dense,
    "stem": stem,
    "slices": slices,
    "depthwise": depthwise,
    "averages": averages,
}

if __name__ == "__main__":
    main()
