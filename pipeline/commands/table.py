"""The subcommands of `octet` by name. Adding one takes an entry here and the function that it names."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.registry import Registry


@dataclass(frozen=True)
class Subcommand:
    """A subcommand.

    Attributes:
        name: the word after `octet`.
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
            "check machine, libraries, GPU and disk; with settings also weights and data",
            "pipeline.commands.doctor:main",
        ),
        Subcommand(
            "data", PREPARE, "list what a dataset contains and what is wrong with it", "data.command:main"
        ),
        Subcommand(
            "inspect",
            PREPARE,
            "describe a checkpoint without running anything in it",
            "models.checkpoints.command:main",
        ),
        Subcommand("run", JOB, "quantize, fine-tune, export, build engines, report", "train_qat:main", True),
        Subcommand(
            "export", JOB, "write the ONNX file of a finished run for another target", "export:main", True
        ),
        Subcommand(
            "check",
            DEPLOY,
            "check a Q/DQ ONNX graph for what reduces speed or accuracy",
            "deploy.check.command:main",
            opens_models=True,
        ),
        Subcommand("compile", DEPLOY, "build an engine from an ONNX file", "deploy.engine:build_main"),
        Subcommand(
            "benchmark",
            DEPLOY,
            "measure the latency of engines",
            "pipeline.commands.benchmark:main",
            opens_models=True,
        ),
        Subcommand(
            "predict",
            LOOK,
            "run a model on images or videos and draw the detections",
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
            "placement",
            LOOK,
            "print which tensors and layers a run quantizes, as a tree",
            "pipeline.commands.placement:main",
        ),
        Subcommand(
            "report", LOOK, "build report.html from report.json, or compare runs", "report.__main__:main"
        ),
    ),
    error=ConfigError,
)
