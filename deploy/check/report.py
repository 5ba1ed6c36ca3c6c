"""The graph check: findings and a summary for any Q/DQ ONNX file, without a GPU and without building an engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from onnx import ModelProto

from deploy.check.rules import rules_for, unequal_scales
from deploy.graph.finding import Finding
from deploy.graph.known import inlined
from deploy.graph.model import load_onnx
from deploy.graph.passes import count_qdq
from deploy.graph.view import AVERAGE_POOLS, WEIGHTED, View
from deploy.naming import module_path


@dataclass(frozen=True)
class Summary:
    """A graph in numbers.

    Attributes:
        num_nodes, num_quantize, num_dequantize: nodes in the file.
        num_convs, num_int8_convs, num_fp8_convs: weighted nodes, and those that run in INT8 and in FP8.
        num_output_convs: weighted nodes at the outputs, float by design.
        num_matmuls, num_quantized_matmuls: products of two computed tensors (attention), and those with INT8 or FP8
            operands.
        num_unmeasured: those whose multiply-accumulates are not known, because a shape is not.
        macs, int8_macs: multiply-accumulates at batch 1 of all of these; None where some are not known.
        int8_share, fp8_share: share of the multiply-accumulates in INT8 and in FP8; None where some are not known.
        inner_int8_share, inner_fp8_share: the same without the output convs: of backbone, neck and head towers.
        precision_changes: places where a kernel has to change type or scale on its own.
    """

    num_nodes: int
    num_quantize: int
    num_dequantize: int
    num_convs: int
    num_int8_convs: int
    num_fp8_convs: int
    num_output_convs: int
    num_matmuls: int
    num_quantized_matmuls: int
    num_unmeasured: int
    macs: int | None
    int8_macs: int | None
    int8_share: float | None
    fp8_share: float | None
    inner_int8_share: float | None
    inner_fp8_share: float | None
    precision_changes: int


@dataclass(frozen=True)
class CheckReport:
    """Everything `python -m deploy.check` prints."""

    path: str
    target: str
    findings: tuple[Finding, ...]
    summary: Summary

    def as_dict(self) -> dict[str, object]:
        """Plain dict, ready for JSON."""
        return asdict(self)


def check_graph(path: Path, image_size: tuple[int, int] | None = None) -> list[Finding]:
    """Findings for an ONNX file; see `inspect_graph` for the summary as well."""
    return list(inspect_graph(path, image_size).findings)


def inspect_graph(
    path: Path, image_size: tuple[int, int] | None = None, target: str | None = None
) -> CheckReport:
    """Check an ONNX file, of this project or of any other tool.

    Args:
        path: the file; it is treated as untrusted data.
        image_size: (height, width), used if neither shapes nor metadata of the file state it; needed for the MAC shares
            only.
        target: engine the graph is for, one of `TARGETS`; None takes what the file says, TensorRT where it says
            nothing.

    Raises:
        DeployError: the file cannot be read.
    """
    return inspect_model(load_onnx(path), str(path), image_size, target)


def inspect_model(
    model: ModelProto,
    path: str = "",
    image_size: tuple[int, int] | None = None,
    target: str | None = None,
) -> CheckReport:
    """Check a model in memory; it is not changed."""
    model = inlined(model)
    view = View(model, image_size, target)
    found = [finding for rule in rules_for(view) for finding in rule(view)]
    findings = (
        [replace(finding, name=module_path(finding.name)) for finding in found] if view.is_ours else found
    )
    return CheckReport(path, view.target, tuple(findings), summarize_view(view, model))


def summarize_view(view: View, model: ModelProto) -> Summary:
    """Count convs, multiply-accumulates and precision changes."""
    num_quantize, num_dequantize = count_qdq(model)
    weighted, matmuls = view.weighted(), view.matmuls()
    number = Counter(view.node_precision(node) for node in weighted)
    macs, inner = Counter[str](), Counter[str]()  # by precision
    for node in [*weighted, *matmuls]:
        precision, count = view.node_precision(node), view.multiply_accumulates(node) or 0
        macs[precision] += count
        if id(node) not in view.output_convs:
            inner[precision] += count
    is_known = bool(weighted) and not view.unmeasured()

    def share(kind: str, counts: Counter[str]) -> float | None:
        return counts[kind] / max(counts.total(), 1) if is_known else None

    return Summary(
        num_nodes=len(model.graph.node),
        num_quantize=num_quantize,
        num_dequantize=num_dequantize,
        num_convs=len(weighted),
        num_int8_convs=number["int8"],
        num_fp8_convs=number["fp8"],
        num_output_convs=sum(id(node) in view.output_convs for node in weighted),
        num_matmuls=len(matmuls),
        num_quantized_matmuls=sum(view.is_quantized(node) for node in matmuls),
        num_unmeasured=len(view.unmeasured()),
        macs=macs.total() if is_known else None,
        int8_macs=macs["int8"] if is_known else None,
        int8_share=share("int8", macs),
        fp8_share=share("fp8", macs),
        inner_int8_share=share("int8", inner),
        inner_fp8_share=share("fp8", inner),
        precision_changes=count_precision_changes(view),
    )


def count_precision_changes(view: View) -> int:
    """Kernels that only change type or scale: Q or DQ that no neighbour takes in, and scales beyond the first."""
    takers = {*WEIGHTED, "Add", *AVERAGE_POOLS, "QuantizeLinear"}
    if view.quantizes_results:
        takers |= {"Sigmoid", "Mul"}  # it has integer kernels for these
    changes = 0 if view.quantizes_results else sum(finding.reformats for finding in unequal_scales(view))
    for quantize in view.quantizers("QuantizeLinear"):
        source = view.producer(quantize.input[0])
        changes += source is None or source.op_type in ("Cast", "Softmax")  # nobody computes it: the image
    for dequantize in view.quantizers("DequantizeLinear"):
        readers = view.readers(dequantize.output[0])
        changes += any(reader.op_type not in takers and not view.is_moving(reader) for reader in readers)
    return changes
