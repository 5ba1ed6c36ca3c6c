r"""What NVIDIA's compiler makes of every architecture: precision of each convolution, kernels, bytes moved.

    python benchmarks/compile_architectures.py runs/architectures.json [--architectures yolov9t,yolov9c] [--full]
    python benchmarks/compile_architectures.py runs/families.json --families yolov8,yolo11,yolo26 --int8-for SM89 \
        --activations silu

TensorRT for RTX builds the engines, without a GPU, so there are no times. Networks have random weights and are
calibrated on random images: placement and compiler do not look at values. For each architecture, with SiLU and with
ReLU, the graphs of the target `tensorrt_rtx` are built: one plan in INT8 for SM80, SM86, SM89 and SM120, one in FP8 for
SM89 and SM120 (a plan has one graph for all of its GPUs, and the weakest decides), with decoded outputs and FP16 scales
and with raw outputs and FP32 scales; for comparison the same network in FP16, and in INT8 without the Q/DQ pairs after
each Resize, as graphs were before these pairs. `--full` builds each form of the outputs with each type of scales for
each GPU alone, `--int8-for SM89` only INT8 with decoded outputs and FP16 scales for that GPU, and FP16. Every layer
that the placement quantizes has to run in the codes of its placement; those that do not are listed, and the exit code
is 1.

The JSON file is written after each network. A stopped run continues: networks in the file are not built again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.choices import ACTIVATIONS, FP8, INTEGER
from core.families import FAMILIES
from core.files import write_json
from core.targets import SCALE_TYPES, TARGETS
from deploy import export_onnx, load_onnx
from deploy.compile.report import BuildSummary, inspect_build
from deploy.graph.model import Graph
from deploy.graph.passes import PassResult, run_pass
from deploy.targets.resize import REPEATED
from models import Detector, build_detector, fold_detector, select_head
from pipeline.stages.export import Deployed
from quant import PlacementOptions, calibrate, insert, place, placement_of, with_named_nodes

TARGET = "tensorrt_rtx"
CAPABILITIES = {INTEGER: ("SM80", "SM86", "SM89", "SM120"), FP8: ("SM89", "SM120")}
PRECISIONS = {INTEGER: "int8", FP8: "fp8"}
SHOWN = "decoded", "fp16"  # outputs and scales of the builds in the table
SHORT = (SHOWN, ("raw", "fp32"))


def build_network(
    architecture: str, activation: str, grid: str, size: int
) -> tuple[Detector, fx.GraphModule]:
    """A detector with random weights, and its network quantized by the default placement."""
    torch.manual_seed(0)
    built = build_detector(architecture, 80, activation)
    detector = fold_detector(select_head(built, built.deployed_head)).eval()
    model = insert(detector.network, place(detector.network, PlacementOptions(grid=grid))).eval()
    calibrate(model, [torch.rand(1, 3, size, size)])
    return detector, model


def export(detector: Detector, model: fx.GraphModule, size: int, form: str, scale_type: str) -> ModelProto:
    """The graph of the target, with nodes named by module path."""
    named, names = with_named_nodes(model)
    outputs = ("output0", "output1") if detector.task == "segment" else ("output0",)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(
            Deployed(named, detector.decode).eval(), path, (size, size), TARGET, output_names=outputs,
            dynamic_batch=False, scale_type=scale_type, outputs=form, names=names,
        )  # fmt: skip
        return load_onnx(path)


@dataclass(frozen=True)
class Wanted:
    """Which builds of a network are made.

    Attributes:
        size: side of the images, pixels.
        is_full: every form of the outputs and type of scales, for each GPU alone.
        int8_for: GPU that INT8 alone is built for, in the form that the table shows; None for all.
    """

    size: int
    is_full: bool = False
    int8_for: str | None = None

    @property
    def capabilities(self) -> Mapping[str, tuple[str, ...]]:
        """GPUs to build for, by kind of grid."""
        return CAPABILITIES if self.int8_for is None else {INTEGER: (self.int8_for,)}


def variants_of(detector: Detector, wanted: Wanted) -> list[tuple[str, str]]:
    """(outputs, type of scales) of the graphs to build; masks have no raw form."""
    if wanted.int8_for is not None:
        return [SHOWN]
    if detector.task == "segment":
        return [("decoded", scale_type) for scale_type in SCALE_TYPES]
    return list(itertools.product(TARGETS[TARGET].outputs, SCALE_TYPES)) if wanted.is_full else list(SHORT)


def without_pairs(graph: Graph) -> PassResult:
    """Take out the Q/DQ pairs that repeat those before a Resize (or a max-pool) after it."""
    gone = [node for node in graph.nodes if node.op_type == "QuantizeLinear" and REPEATED in node.name]
    readers = [reader for node in gone for reader in graph.consumers[node.output[0]]]
    for node, reader in zip(gone, readers, strict=True):
        graph.rewire(reader.output[0], node.input[0])
    graph.remove([*gone, *readers])
    return PassResult(-len(gone), -len(readers), len(gone))


def builds(architecture: str, activation: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Every build of a network, as plain data."""
    fp16: BuildSummary | None = None
    for grid, capabilities in wanted.capabilities.items():
        detector, model = build_network(architecture, activation, grid, wanted.size)
        planned = {site.layer for site in placement_of(model).weights}
        for form, scale_type in variants_of(detector, wanted):
            graph = export(detector, model, wanted.size, form, scale_type)
            graphs = {PRECISIONS[grid]: graph}
            if (grid, form, scale_type) == (INTEGER, *SHOWN) and wanted.int8_for is None:
                graphs["before"] = ModelProto()
                graphs["before"].CopyFrom(graph)
                run_pass(graphs["before"], without_pairs)
            for (kind, one), plan in itertools.product(
                graphs.items(), capabilities if wanted.is_full else [",".join(capabilities)]
            ):
                report = inspect_build(one, plan, fp16=fp16)
                if fp16 is None:
                    fp16 = report.fp16
                    yield row_of(fp16, "fp16", plan)
                found = {layer.name for layer in report.layers if layer.precision == PRECISIONS[grid]}
                yield row_of(report.engine, kind, plan) | {
                    "outputs": form,
                    "scales": scale_type,
                    "planned": len(planned),
                    "left_out": sorted(planned - found),
                }


def row_of(engine: BuildSummary, kind: str, capability: str) -> dict[str, Any]:
    """One build; `kind` is int8, fp8, fp16, or before."""
    return {
        "kind": kind,
        "capability": capability,
        "kernels": engine.num_kernels,
        "convolutions": engine.convolutions,
        "megabytes": engine.moved_bytes / 1e6,
    }


def print_table(networks: dict[str, list[dict[str, Any]]]) -> int:
    """The table, and every build that leaves a planned layer in float; returns how many there are."""
    headings = (
        "network", "convolutions", "in the plan, INT8", "in INT8 before", "in INT8", "in the plan, FP8", "in FP8",
        "builds", "kernels INT8, FP8, FP16", "MB INT8, FP8, FP16",
    )  # fmt: skip
    print(f"| {' | '.join(headings)} |\n| --- |{' ---: |' * (len(headings) - 1)}")
    failed = 0
    for name, rows in networks.items():
        main: dict[str, Any] = {row["kind"]: row for row in reversed(rows)}  # the first of each kind
        shown = [main.get(kind) for kind in ("int8", "fp8", "fp16")]
        cells = [
            sum(main["fp16"]["convolutions"].values()), main["int8"]["planned"], _count(main, "before", "int8"),
            _count(main, "int8", "int8"), main["fp8"]["planned"] if "fp8" in main else "-", _count(main, "fp8", "fp8"),
            len(rows), ", ".join(str(row["kernels"]) if row else "-" for row in shown),
            ", ".join(f"{row['megabytes']:.1f}" if row else "-" for row in shown),
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(map(str, cells))} |")
        for row in rows:
            if row["kind"] != "before" and row.get("left_out"):
                failed += 1
                where = " ".join(row[key] for key in ("kind", "capability", "outputs", "scales"))
                print(f"{name}, {where}: left in float: {', '.join(row['left_out'])}", file=sys.stderr)
    return failed


def _count(main: dict[str, Any], kind: str, precision: str) -> str:
    """How many convolutions of a build run in a precision; `-` where there is no such build."""
    return str(main[kind]["convolutions"].get(precision, 0)) if kind in main else "-"


def main() -> int:
    """Build what is missing, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "json", type=Path, help="results; read where it is there, and written after each network"
    )
    parser.add_argument("--architectures", help="instead of all those of the families")
    parser.add_argument("--families", default=FAMILIES[0].name, help="of core/families.py")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS))
    parser.add_argument(
        "--full", action="store_true", help="every form and type of scales, for each GPU alone"
    )
    parser.add_argument("--int8-for", choices=CAPABILITIES[INTEGER], help="only INT8 and FP16, for this GPU")
    parser.add_argument("--size", type=int, default=320, help="side of the images, pixels")
    options = parser.parse_args()
    networks: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    wanted = Wanted(options.size, options.full, options.int8_for)
    families = [entry for entry in FAMILIES if entry.name in options.families.split(",")]
    names = [name for entry in families for name in (*entry.detectors, *entry.segmenters)]
    for architecture in options.architectures.split(",") if options.architectures else names:
        for activation in options.activations.split(","):
            name = f"{architecture} {activation}"
            if name not in networks:
                networks[name] = list(builds(architecture, activation, wanted))
                write_json(options.json, networks)
    return int(print_table(networks) > 0)


if __name__ == "__main__":
    sys.exit(main())
