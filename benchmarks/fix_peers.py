r"""What `deploy.check --fix` makes of other tools' graphs: findings, the compiled engine and AP, before and after.

    python benchmarks/check_peers.py --weights W.pt --data D --folder FOLDER --modelopt-python PYTHON
    python benchmarks/fix_peers.py FOLDER [--capability SM89] [--views 3] [--json FILE] \
        [+experiment=bccd weights=W.pt data.root=D]

FOLDER holds the graphs that `check_peers.py` wrote; the fixed ones are written to FOLDER/fixed. Engines are built by
TensorRT for RTX, without a GPU. With the settings of a job AP is measured too, literally by ONNX Runtime, node by node.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compare_ptq import octet_job
from benchmarks.peers.tools import circumstances, write_result
from benchmarks.views import ap_of_views
from core.errors import DeployError
from deploy import ONNXRuntime, inspect_graph, load_onnx
from deploy.check.fix import fix_file
from deploy.compile.report import inspect_build
from pipeline.job import Job
from pipeline.stages.engine import engine_predictor

GRAPHS = ("naive", "modelopt-defaults", "modelopt-defaults-FP16", "nncf-defaults", "onnxruntime-defaults")


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", default="SM89")
    parser.add_argument("--views", type=int, default=1, help="views of the validation images")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    job = octet_job(overrides, options.folder / "run") if overrides else None
    rows: dict[str, dict[str, Any]] = {}
    print("| graph | | findings | kernels | convolutions | MB | mean AP |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: |")
    for name in GRAPHS:
        before, after = options.folder / f"{name}.onnx", options.folder / "fixed" / f"{name}.onnx"
        if before.exists():
            report = fix_file(before, after)
            for when, path in (("before", before), ("after", after)):
                rows[f"{name}, {when}"] = row = measured(path, options.capability, job, options.views)
                print_row(name, when, row)
            row["fixes"] = report.as_dict()["fixes"]
    write_result(options.json, {"settings": overrides, **circumstances({}), "rows": rows})
    return 0


def measured(path: Path, capability: str, job: Job | None, views: int) -> dict[str, Any]:
    """Findings, the engine or why there is none, and AP where a job is given."""
    row: dict[str, Any] = {"findings": len(inspect_graph(path).findings)}
    try:
        build = inspect_build(load_onnx(path), capability)
        row |= {"engine": build.as_dict()["engine"], "fp16": build.as_dict()["fp16"]}
    except DeployError as error:
        row["refused"] = str(error)
    if job is not None:
        with ONNXRuntime(path, optimize=False) as runtime:
            row["ap"] = ap_of_views(job, engine_predictor(job, runtime), views)
    return row


def print_row(graph: str, when: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    engine = row.get("engine")
    built = "| refused | | "
    if engine is not None:
        convolutions = ", ".join(f"{count} {name}" for name, count in engine["convolutions"].items())
        built = f"| {engine['num_kernels']} | {convolutions} | {engine['moved_bytes'] / 1e6:.1f} "
    ap = f"{np.mean(row['ap']):.4f}" if "ap" in row else ""
    print(f"| {graph} | {when} | {row['findings']} {built}| {ap} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
