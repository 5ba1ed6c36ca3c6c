"""The subcommands of `octet` by name. Adding one takes an entry here and the function that it names."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.registry import Registry


@dataclass(frozen=True)
class Subcommand:
    """A subcommand.

    Attributes:
        name: what is typed behind `octet`.
        group: heading in `octet --help`.
        summary: what it does, in one line.
        target: `module:function`, imported when it is called.
        is_entry: whether the function is an entry of Hydra, which reads `sys.argv` and KEY=VALUE settings; others take
            the arguments and the name of the program, and return the exit code.
        opens_models: whether it opens model files, which may be from others: it runs with limits.
    """

    name: str
    group: str
    summary: str
    target: str
    is_entry: bool = False
    opens_models: bool = False


PREPARE, JOB, DEPLOY, LOOK = "before a run", "the job", "engines", "results"
SUBCOMMANDS: Registry[Subcommand] = Registry(
    "command",
    (
        Subcommand(
            "doctor",
            PREPARE,
            "check machine, libraries, GPU, disk, and with settings also weights and data",
            "pipeline.commands.doctor:main",
        ),
        Subcommand("data", PREPARE, "say what is in a dataset, and what is wrong", "data.command:main"),
        Subcommand("inspect", PREPARE, "say what a checkpoint holds", "models.checkpoints.command:main"),
        Subcommand(
            "run", JOB, "quantize, fine-tune, export, build, report: train_qat.py", "train_qat:main", True
        ),
        Subcommand(
            "export", JOB, "write the ONNX of a finished run for a target: export.py", "export:main", True
        ),
        Subcommand(
            "check",
            DEPLOY,
            "check a Q/DQ ONNX graph for what makes it slow",
            "deploy.check.command:main",
            opens_models=True,
        ),
        Subcommand("compile", DEPLOY, "build an engine of an ONNX file", "deploy.engine:build_main"),
        Subcommand(
            "benchmark",
            DEPLOY,
            "time engines, alone or against others",
            "pipeline.commands.benchmark:main",
            opens_models=True,
        ),
        Subcommand(
            "predict",
            LOOK,
            "draw what a model detects in your pictures",
            "pipeline.predict:main",
            opens_models=True,
        ),
        Subcommand(
            "evaluate",
            LOOK,
            "measure a model on a dataset",
            "pipeline.evaluate:main",
            opens_models=True,
        ),
        Subcommand(
            "placement", LOOK, "print what a run quantizes, as a tree", "pipeline.commands.placement:main"
        ),
        Subcommand(
            "report", LOOK, "build report.html of a run, or of several side by side", "report.__main__:main"
        ),
    ),
    error=ConfigError,
)
