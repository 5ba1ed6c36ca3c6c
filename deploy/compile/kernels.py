"""The kernels of a build, read from TensorRT for RTX's verbose log.

With detailed profiling verbosity the last part of a build's log holds one line for each kernel, between the line
`Layers:` and an empty line:

    Name: ..., LayerType: correlation, Inputs: [ { Name: ..., Dimensions: [1,16,160,160], Strides: [...],
    StrideOrder: [...], Datatype: Int8, Format: (NHWC) ... }], Constants: [...], Outputs: [...], TacticName: ...,
    StreamId: 0, Metadata: [ONNX Layer: /network/conv/Conv][ONNX Layer: ...]

The log is not a documented interface, so it is read strictly: a line of another form is an error, which names the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from core.errors import DeployError

BYTES = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int32": 4, "Int64": 8, "Int8": 1, "UInt8": 1, "FP8": 1, "Bool": 1,
    "Int4": 0.5, "FP4": 0.5,
}  # fmt: skip
SEPARATOR = "\x1f"  # between the nodes of a kernel
SYNCHRONISATION = frozenset({"signal", "wait"})  # between streams; they move nothing

_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+(?:, EventId: \d+)?, "
    r"Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(
    r" ?\{ Name: (?P<name>.*?), Dimensions: \[(?P<dimensions>[-\d,]*)\], Strides: \[[-\d,]*\], "
    r"StrideOrder: \[[\d,]*\], Datatype: (?P<type>\w+), Format: (?P<format>[^}]*?) ?\}(?:,|$)"
)
_LAYER = re.compile(r"\[ONNX Layer: (?P<name>.*)\](?:__gemm_from_conv1x1)?")


@dataclass(frozen=True)
class KernelTensor:
    """A tensor that a kernel reads or writes: its shape and the compiler's name of its type, such as `Int8`.

    Dimensions that a profile leaves open are -1.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def num_bytes(self) -> float:
        """Size in memory; NaN where a dimension is open."""
        return math.nan if -1 in self.shape else math.prod(self.shape) * BYTES[self.type]


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        name: the compiler's name.
        kind: `correlation` (a convolution or matrix product), `kgen` (generated, element by element),
            `runtime_fusion`, `avgpool`, `maxpool`, ...
        inputs, constants, outputs: its tensors; weights are constants, or inputs where they are computed.
        nodes: ONNX nodes that went into it.
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: tuple[str, ...]

    @property
    def moved_bytes(self) -> float:
        """Bytes of its inputs and outputs: what it reads and writes beside constants."""
        return sum(tensor.num_bytes for tensor in (*self.inputs, *self.outputs))


def read_kernels(messages: Iterable[str]) -> list[Kernel]:
    """The kernels that a build's log lists, those aside that only synchronise streams.

    Args:
        messages: messages of the logger, in order; one may hold several lines.

    Raises:
        DeployError: no list of kernels, or a line of an unknown form.
    """
    lines = (line for message in messages for line in message.split("\n"))
    if not any(line.strip() == "Layers:" for line in lines):
        raise DeployError(
            "The compiler's log lists no kernels (no line 'Layers:'): build with a verbose logger and detailed "
            "profiling verbosity; with both, this version of TensorRT for RTX writes another log."
        )
    kernels = []
    for line in lines:
        if not line.strip():
            break
        kernel = _read_line(line.strip())
        if kernel.kind not in SYNCHRONISATION:
            kernels.append(kernel)
    if not kernels:
        raise DeployError("The compiler's log lists no kernel below 'Layers:'.")
    return kernels


def _read_line(line: str) -> Kernel:
    match = _LINE.fullmatch(line)
    if match is None:
        raise _unknown("kernel", line)
    inputs, constants, outputs = (
        tuple(_read_tensors(match[name])) for name in ("inputs", "constants", "outputs")
    )
    layers = [_LAYER.fullmatch(part) for part in match["metadata"].split(SEPARATOR) if part]
    nodes = [found["name"] for found in layers if found is not None]
    if len(nodes) != len(layers):
        raise _unknown("metadata", match["metadata"])
    return Kernel(match["name"], match["kind"], inputs, constants, outputs, tuple(nodes))


def _read_tensors(text: str) -> Iterator[KernelTensor]:
    position = 0
    while position < len(text):
        match = _TENSOR.match(text, position)
        if match is None or match["type"] not in BYTES:
            raise _unknown("tensor", text[position:])
        dimensions = tuple(int(size) for size in match["dimensions"].split(",") if size)
        yield KernelTensor(match["name"], dimensions, match["type"])
        position = match.end()


def _unknown(what: str, text: str) -> DeployError:
    return DeployError(
        f"The compiler's log has a {what} of unknown form: {text[:200]!r}. This version of TensorRT for RTX writes "
        "another log; use the version that docs/deployment.md names."
    )


def total_bytes(kernels: Sequence[Kernel]) -> float:
    """Bytes that all kernels read and write: an approximation of the memory traffic, not a time."""
    return sum(kernel.moved_bytes for kernel in kernels)
