"""Which files of a run hold its graphs and engines: by what its stages and `export.py` wrote, never by guessing.

    python -m pipeline.run.files RUN --runtime NAME

prints the models that a comparison of the runtime times, one a line, as `python -m deploy.benchmark --compare` takes
them (PATH@RUNTIME[:PRECISION]): the float ones, then the quantized one. Exit code 2: wrong arguments. 3: a file is
missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.schema import Config
from core.choices import QUANTIZED
from core.command import path_argument, reports_errors, run_command
from core.errors import DeployError
from core.runtimes import RUNTIMES, RuntimeEntry
from pipeline.run.directory import Run

FLOAT_ONNX = "float.onnx"
ENGINES = "engines"  # folder of the stage `engine`
EXPORT_REPORT = "export.json"
INT8_MODEL = "model.onnx"


def target_of(config: Config, runtime: str) -> str:
    """Target whose graph a runtime runs: the configured one where it takes it."""
    return RUNTIMES[runtime].target_for(config.deploy.target)


def model_name(config: Config, target: str) -> str:
    """File name of the INT8 ONNX for a target: the configured one is `model.onnx`."""
    return INT8_MODEL if target == config.deploy.target else f"model-{target}.onnx"


def export_path(run: Run, target: str) -> Path:
    """Where `export.py` writes the graph for a target unless told otherwise."""
    return run.path("export") / f"model-{target}.onnx"


def find_graph(run: Run, targets: Sequence[str]) -> Path:
    """The quantized graph for one of these targets, of the stage `export` or else of `export.py`.

    Raises:
        DeployError: the run has none; the message says how to make it.
    """
    report = run.read_json(EXPORT_REPORT) if run.path(EXPORT_REPORT).is_file() else {"exports": []}
    written = {export["target"]: run.path(export["path"]) for export in report["exports"]}
    paths = [path for target in targets for path in (written.get(target), export_path(run, target)) if path]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise DeployError(
            f"{run.directory} has no quantized graph for {' or '.join(targets)}: write one with python export.py "
            f"run={run.directory} target={targets[0]}."
        )
    return found


def compared_models(run: Run, runtime: RuntimeEntry) -> list[str]:
    """What a comparison of a runtime times, float first, as `deploy.benchmark` takes it.

    Raises:
        DeployError: a graph or an engine is missing.
    """
    if not runtime.reads_onnx:
        return [f"{path}@{runtime.name}" for path in _engines(run, runtime)]
    plain = run.path(FLOAT_ONNX)
    if not plain.is_file():
        raise DeployError(f"No {plain}: run the stage export first.")
    variants = ["", f":{runtime.automatic_precision}"] if runtime.automatic_precision else [""]
    graphs = [f"{plain}@{runtime.name}{variant}" for variant in variants]
    return [*graphs, f"{find_graph(run, runtime.targets)}@{runtime.name}"]


def _engines(run: Run, runtime: RuntimeEntry) -> list[Path]:
    """Engines of a runtime that reads no ONNX: those of its own script, else those of the stage `engine`."""
    ending = runtime.suffixes[0]
    own = [run.path(runtime.name) / f"{name}{ending}" for name in ("float", *QUANTIZED)]
    own = [path for path in own if path.is_file()]
    if len(own) > 1 and own[0].stem == "float":
        return own
    folder = run.path(ENGINES)
    built = [folder / runtime.engine_name(FLOAT_ONNX, precision) for precision in runtime.float_precisions]
    floats = [path for path in built if path.is_file()]
    graph = find_graph(run, runtime.targets)
    quantized = find_engine(run, runtime, graph.name)
    if not floats or quantized is None:
        script = f", or {runtime.built_by}" if runtime.built_by else ""
        raise DeployError(f"{run.directory} has no {runtime.title} engines: run its stage engine{script}.")
    return [*floats, quantized]


def find_engine(run: Run, runtime: RuntimeEntry, graph: str) -> Path | None:
    """The engine that the stage `engine` built of a quantized graph, by the graph's file name; None without one."""
    paths = [run.path(ENGINES) / runtime.engine_name(graph, precision) for precision in QUANTIZED]
    return next((path for path in paths if path.is_file()), None)


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run.files", description="List the models of a run."
    )
    parser.add_argument("run", type=path_argument, help="run directory of train_qat.py")
    parser.add_argument("--runtime", choices=RUNTIMES, default="openvino")
    options = parser.parse_args(arguments)
    print("\n".join(compared_models(Run(options.run.resolve()), RUNTIMES[options.runtime])))
    return 0


if __name__ == "__main__":
    run_command(main)
