"""`python -m deploy.check MODEL.onnx [--strict] [--json FILE] [--svg FILE] [--target TARGET]`: findings of a graph.

With `--fix OUT.onnx` the graph is fixed first, as far as that needs no data, and everything else is about OUT.onnx;
`--images FOLDER` compares the outputs of both. With `--compile SM89` NVIDIA's compiler (TensorRT for RTX, no GPU
needed) builds the graph as well, and the report says what the engine does with every convolution.

Exit code 0; 4 with --strict when there are findings; 3 when the file cannot be read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.command import command_parser, path_argument, reports_errors, size_argument
from core.confinement import confine, limited_time
from core.errors import EXIT_GATE
from core.files import write_json, write_text
from core.names import printable
from core.targets import TARGETS
from deploy.check.report import CheckReport, inspect_graph
from deploy.check.svg import draw_graph
from deploy.graph.finding import Finding
from deploy.graph.model import load_onnx
from deploy.graph.view import View

if TYPE_CHECKING:
    from deploy.compile.report import CompileReport

EXAMPLES = (
    "%(prog)s runs/bccd/latest/model.onnx --strict",
    "%(prog)s model.onnx --fix fixed.onnx --images datasets/bccd/images/val",
    "%(prog)s model.onnx --compile SM86,SM89",
)
COMPILE_EFFORT = 40  # times what a check may take


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m deploy.check") -> int:
    """Run the check; returns the exit code."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    if options.images is not None and options.fix is None:
        parser.error("--images compares the graphs before and after --fix OUT.onnx; give both")
    compiles = options.compile is not None
    confine([options.model], 4 * 3 * 640 * 640, options.trust, COMPILE_EFFORT if compiles else 1)
    with limited_time():
        return _check(options)


def _check(options: argparse.Namespace) -> int:
    path, fixed = options.model, {}
    if options.fix is not None:
        from deploy.check.fix import compare_files, fix_file, format_fixes

        fixes, path = fix_file(options.model, options.fix, options.size, options.target), options.fix
        fixed = {"fixed": fixes.as_dict()}
        print(printable(format_fixes(fixes, options.fix)))
        if options.images is not None:
            print(compare_files(options.model, options.fix, options.images, options.size))
    report = inspect_graph(path, options.size, options.target)
    if options.svg is not None:
        view = View(load_onnx(path), options.size, options.target)
        write_text(options.svg, draw_graph(view))
    builds = []
    if options.compile is not None:
        from deploy.compile.report import inspect_build  # with the compiler's libraries, 220 MB

        model = load_onnx(path)
        builds = [inspect_build(model, name, options.size) for name in options.compile.split(",")]
    if options.json is not None:
        compiled = {"compiled": [build.as_dict() for build in builds]} if builds else {}
        write_json(options.json, {**report.as_dict(), **compiled, **fixed})
    print(printable(format_report(report)))
    for build in builds:
        print(printable(format_build(build)))
    findings = [*report.findings, *(finding for build in builds for finding in build.findings)]
    return EXIT_GATE if options.strict and findings else 0


def format_report(report: CheckReport) -> str:
    """The report as text: findings by rule, then the summary."""
    lines = [f"{report.path}  (target: {report.target or 'not stated, TensorRT assumed'})"]
    lines += format_findings(report.findings)
    summary = report.summary
    counts = Counter(finding.rule for finding in report.findings)
    listed = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    lines.append(f"{len(report.findings)} findings" + (f": {listed}" if listed else ""))
    for name, number, share, inner in (
        ("INT8", summary.num_int8_convs, summary.int8_share, summary.inner_int8_share),
        ("FP8", summary.num_fp8_convs, summary.fp8_share, summary.inner_fp8_share),
    ):
        if number or (name == "INT8" and not summary.num_fp8_convs):
            work = "share of the multiply-accumulates unknown"
            if share is not None and inner is not None and summary.macs is not None:
                work = (
                    f"{share:.2%} of {summary.macs / 1e9:.2f} G multiply-accumulates, {inner:.2%} without the output "
                    "convs"
                )
            lines.append(
                f"{number} of {summary.num_convs} convs in {name} ({summary.num_output_convs} at the outputs); {work}"
            )
    if summary.num_matmuls:
        lines.append(
            f"{summary.num_quantized_matmuls} of {summary.num_matmuls} products of two tensors read quantized data"
        )
    lines.append(
        f"{summary.num_quantize} Q, {summary.num_dequantize} DQ, "
        f"{summary.precision_changes} precision changes predicted"
    )
    return "\n".join(lines)


def format_findings(findings: Sequence[Finding]) -> list[str]:
    """Three lines for each finding: rule and name, hazard, remedy."""
    lines = []
    for finding in findings:
        cost = f"  [+{finding.reformats} kernels]" if finding.reformats else ""
        lines += [
            f"  {finding.rule}: {finding.name}{cost}",
            f"      {finding.hazard}",
            f"      -> {finding.remedy}",
        ]
    return lines


def format_build(build: CompileReport) -> str:
    """The compiler's result: findings, then the figures of the engine and of its FP16 build."""
    lines = [f"compiled for {build.capability} by TensorRT for RTX {build.version} (no GPU: no times)"]
    lines += format_findings(build.findings)
    lines.append(f"{len(build.findings)} findings")
    for label, engine in (("as the file says", build.engine), ("without Q/DQ, FP16", build.fp16)):
        convolutions = ", ".join(f"{count} {name}" for name, count in engine.convolutions.items())
        lines.append(
            f"{label}: {engine.num_kernels} kernels, convolutions: {convolutions}; kernels read and write "
            f"{engine.moved_bytes / 1e6:.1f} MB"
        )
    if build.matmuls:
        precisions = Counter(layer.precision or "unknown" for layer in build.matmuls)
        listed = ", ".join(f"{count} {name}" for name, count in sorted(precisions.items()))
        lines.append(f"products of two tensors: {listed}")
    return "\n".join(lines)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, "Check a Q/DQ ONNX graph.", EXAMPLES)
    parser.add_argument("model", type=path_argument, help="ONNX file")
    parser.add_argument("--strict", action="store_true", help="exit with 4 when there are findings")
    parser.add_argument("--json", type=Path, help="write findings and summary to this file")
    parser.add_argument("--svg", type=Path, help="draw the graph, coloured by precision, to this file")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="SM89",
        metavar="CAPABILITY,...",
        help="build with TensorRT for RTX for these compute capabilities, such as SM86,SM89, and report the engine",
    )
    parser.add_argument(
        "--trust", action="store_true", help="remove the limits on memory and time, for your own files"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="OUT.onnx", help="fix what needs no data, write this file and check it"
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="with --fix: folder or .npz of images to compare the outputs of both graphs on",
    )
    parser.add_argument(
        "--size", type=size_argument, help="image size HEIGHTxWIDTH, for graphs that leave it open"
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="engine that the graph is for, if the file does not state it"
    )
    return parser
