"""What each operator is to quantization: one table for torch.fx graphs and for ONNX graphs, and two rules over it.

Placement reads the names of modules, functions and methods, the graph check and the export passes read the ONNX types.
A rule that both sides apply (which layers have no kernel, which summand an engine fuses) is one function here,
so that a placed and exported network passes the check. Data only: torch names are strings, see `quant.graph`.

Sources: NVIDIA's tensorflow-quantization guide (custom Q/DQ cases) and modelopt's ONNX quantization.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

NARROW_CHANNELS = 16
FP8_KERNEL_ELEMENTS = 32


class Kind(enum.Enum):
    """What an operator is to quantization."""

    WEIGHTED = "weighted"  # wants INT8 data and has INT8 weights
    TRANSPARENT = "transparent"  # moves or selects values: quantize-dequantize commutes with it
    CONCAT = "concat"  # transparent where its inputs share one scale
    ADD = "add"  # reads INT8, makes a new tensor with a scale of its own
    AVERAGE = "average"  # as a sum
    MATMUL = (
        "matmul"  # multiplies two computed tensors: in INT8 where asked for, each with a scale of its own
    )
    FLOAT = "float"  # everything else


@dataclass(frozen=True)
class Names:
    """What operators are called: `nn` modules, functions and tensor methods in torch, and types in ONNX."""

    modules: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    onnx: tuple[str, ...] = ()


OPERATORS: Mapping[Kind, Names] = {
    Kind.WEIGHTED: Names(
        modules=("nn.Conv1d", "nn.Conv2d", "nn.ConvTranspose2d", "nn.Linear"),
        onnx=("Conv", "ConvTranspose", "Gemm", "MatMul"),
    ),
    Kind.TRANSPARENT: Names(
        modules=(
            "nn.MaxPool2d", "nn.Flatten", "nn.Unflatten", "nn.PixelShuffle", "nn.ChannelShuffle", "nn.Dropout",
            "nn.Dropout2d",
        ),
        functions=(
            "operator.getitem", "torch.chunk", "torch.split", "torch.flatten", "torch.reshape", "torch.permute",
            "torch.transpose", "torch.squeeze", "torch.unsqueeze", "torch.max_pool2d", "F.max_pool2d",
            "F.pixel_shuffle", "F.dropout",
        ),
        methods=(
            "chunk", "split", "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze",
            "contiguous", "expand", "detach",
        ),
        onnx=(
            "Split", "Slice", "Gather", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten",
            "Expand", "DepthToSpace",
        ),
    ),
    Kind.CONCAT: Names(functions=("torch.cat", "torch.concat", "torch.stack"), onnx=("Concat",)),
    Kind.ADD: Names(functions=("operator.add", "operator.iadd", "torch.add"), onnx=("Add",)),
    Kind.AVERAGE: Names(
        modules=("nn.AvgPool2d", "nn.AdaptiveAvgPool2d"),
        functions=("F.avg_pool2d", "F.adaptive_avg_pool2d"),
        onnx=("AveragePool", "GlobalAveragePool"),
    ),
    # in ONNX, a MatMul with a constant operand is a layer
    Kind.MATMUL: Names(
        functions=("torch.matmul", "torch.bmm", "operator.matmul"), methods=("matmul", "bmm"), onnx=("MatMul",)
    ),
}  # fmt: skip

RESIZE = Names(modules=("nn.Upsample",), functions=("F.interpolate",), onnx=("Resize",))
"""Transparent where they take the nearest value, float otherwise."""

NONNEGATIVE = Names(
    modules=("nn.ReLU", "nn.ReLU6", "nn.Sigmoid", "nn.Hardsigmoid", "nn.Softmax"),
    functions=(
        "torch.relu", "torch.sigmoid", "torch.softmax", "F.relu", "F.relu6", "F.sigmoid", "F.hardsigmoid", "F.softmax",
    ),
    methods=("relu", "sigmoid", "softmax"),
)  # fmt: skip
"""No result is below 0, for any input."""

SIGMOIDS = ("Sigmoid", "HardSigmoid")
"""ONNX types that, multiplied with their own input, make SiLU and hard-swish."""

ACTIVATIONS = frozenset(
    (*SIGMOIDS, "Relu", "LeakyRelu", "HardSwish", "Clip", "Mish", "Gelu", "Tanh", "Elu", "PRelu")
)
"""ONNX types that engines fuse with the convolution before them."""


def narrow_reason(
    inputs: int, outputs: int, groups: int, kernel: Sequence[int], reads_image: bool
) -> str | None:
    """Why a convolution has no good INT8 kernel; None where it has one.

    From 16 input channels per group and 16 output channels on, padding to the width of a kernel costs little. Below,
    modelopt's conditions decide: a plain convolution needs a square kernel, a channel count that is a multiple of 8,
    and 16 channels on one side (or it reads the image); a grouped one needs output channels in multiples of 8 and a
    kernel of at least 3. A 1x1 convolution to one channel is the projection of a distribution focal loss: float.

    Args:
        inputs: input channels of all groups.
        outputs: output channels of all groups.
        groups: number of groups.
        kernel: size of the kernel, one number for each dimension.
        reads_image: whether the input comes from the network's input.
    """
    if min(inputs // groups, outputs) >= NARROW_CHANNELS:
        return None
    if outputs == 1 and set(kernel) == {1}:
        fits = False
    elif groups > 1:
        fits = outputs % 8 == 0 and min(kernel) >= 3
    else:
        aligned = outputs % 8 == 0 or inputs % 8 == 0
        wide = reads_image or max(inputs, outputs) >= NARROW_CHANNELS
        fits = aligned and wide and len(set(kernel)) == 1
    if fits:
        return None
    size = "x".join(str(length) for length in kernel)
    return f"{inputs} -> {outputs} channels in {groups} groups, kernel {size}, has no good INT8 kernel"


def unsupported_reason(kernel: Sequence[int], is_transposed: bool, is_fp8: bool) -> str | None:
    """Why no engine runs a convolution in 8 bits; None where one does.

    Found by building and timing them: OpenVINO 2026.4 runs quantized transposed convolutions in FP32 and TensorRT for
    RTX 1.7 in FP16, and ONNX Runtime has no operator for them. TensorRT for RTX runs FP8 kernels of up to 32 elements;
    the one exception, depthwise 7x7 of stride 1 on SM120, does not count, since a plan may be for SM89 as well.
    `benchmarks/compile_convolutions.py` builds the evidence.

    Args:
        kernel: size of the kernel, one number for each dimension.
        is_transposed: whether it is a transposed convolution.
        is_fp8: whether its codes would be FP8.
    """
    if is_transposed:
        return "engines run transposed convolutions in float"
    if is_fp8 and math.prod(kernel) > FP8_KERNEL_ELEMENTS:
        size = "x".join(str(length) for length in kernel)
        return f"FP8 kernels have at most {FP8_KERNEL_ELEMENTS} elements, not {size}"
    return None


T = TypeVar("T", bound=Hashable)


class TensorGraph(Protocol[T]):
    """What the rule about sums asks of a graph; Q and DQ are looked through."""

    def kind(self, tensor: T) -> Kind:
        """Kind of the operator that makes a tensor; an activation of several operators counts as one."""

    def sources(self, tensor: T) -> Sequence[T]:
        """Tensors that this operator reads, constants left out."""

    def num_readers(self, tensor: T) -> int:
        """How many operators read a tensor."""


def fused_summand(graph: TensorGraph[T], summands: Sequence[T]) -> T | None:
    """The summand whose layer an engine fuses with the sum; it is left unquantized, every other one is quantized.

    It comes directly from a layer, its activation or an inner sum, and nothing else reads it: after a concat or a
    split the sum is a separate kernel. Of several, the one after most layers is chosen: the residual branch.
    """
    fresh = [
        tensor for tensor in summands if graph.num_readers(tensor) == 1 and _comes_from_layer(graph, tensor)
    ]
    if len(fresh) < 2:
        return fresh[0] if fresh else None
    return max(fresh, key=lambda tensor: _num_layers_behind(graph, tensor))


def _comes_from_layer(graph: TensorGraph[T], tensor: T) -> bool:
    kind = graph.kind(tensor)
    if kind in (Kind.WEIGHTED, Kind.ADD):
        return True
    return kind is Kind.FLOAT and any(graph.kind(s) is Kind.WEIGHTED for s in graph.sources(tensor))


def _num_layers_behind(graph: TensorGraph[T], tensor: T) -> int:
    seen = {tensor}
    frontier = [tensor]
    while frontier:
        fresh = [source for source in graph.sources(frontier.pop()) if source not in seen]
        seen.update(fresh)
        frontier += fresh
    return sum(graph.kind(found) is Kind.WEIGHTED for found in seen)
