"""Commands that a report prints: to repeat the run, to continue it, to deploy it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.compose import CONFIG_DIR, usual_settings
from configs.schema import Config
from core.targets import TARGETS
from pipeline.run.directory import Run
from pipeline.run.files import EXPORT_REPORT

OF_THE_START = (
    "experiment",
    "run_dir",
    "resume",
)  # what a run is called and how it was started, not what it does
CHECKOUT = {
    "run": "python train_qat.py",
    "export": "python export.py",
    "report": "python -m report",
    "predict": "python -m pipeline.predict",
    "evaluate": "python -m pipeline.evaluate",
}
OCTET = {name: f"octet {name}" for name in CHECKOUT}
GENERAL = "detector"  # the experiment for any detector and data
WHOLE = ("data.merge_classes",)  # dictionaries with keys of the user's own
_PLAIN = re.compile(r"[A-Za-z_./]([\w./:@+%-]| (?=[^ ]))*")
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"})


def flat_configuration(config: Config) -> dict[str, Any]:
    """Setting -> value, by dotted key; lists and free dictionaries stay whole."""
    return _flatten(asdict(config))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, Mapping) and value and key not in WHOLE
        found |= _flatten(value, f"{key}.") if is_section else {key: value}
    return found


def changed_settings(config: Config) -> dict[str, Any]:
    """The settings that are not at the defaults of their experiment."""
    usual = _flatten(usual_settings([_experiment(config)]))
    return {
        key: value
        for key, value in flat_configuration(config).items()
        if key not in OF_THE_START and usual.get(key, ()) != value
    }


def overrides(config: Config) -> list[str]:
    """What makes this configuration on the command line of `train_qat.py`."""
    return [_experiment(config), *(override(key, value) for key, value in changed_settings(config).items())]


def _experiment(config: Config) -> str:
    """The experiment; for one of the user's own, whose file may be anywhere, the general one."""
    is_known = (CONFIG_DIR / "experiment" / f"{config.experiment}.yaml").is_file()
    return "+" + override("experiment", config.experiment if is_known else GENERAL)


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it on a command line.

    Example: `override("stages", ["float", "export"])` is `stages=[float,export]`.
    """
    return f"{'+' if key in WHOLE else ''}{key}={_hydra(value)}"


def _hydra(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra(str(key))}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra, value)) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    escaped = re.sub(r"\\+(?='|$)", lambda match: match[0] * 2, text).replace("'", "\\'")
    return f"'{escaped}'"


def started_by_octet(arguments: Sequence[str] | None = None) -> bool:
    """Whether the command `octet` started this process; else a script of the checkout did.

    Args:
        arguments: of the process, its program first; None reads `sys.argv`.
    """
    return (sys.argv if arguments is None else arguments)[0].split(" ")[0] == "octet"


def resume_command(directory: Path, arguments: Sequence[str] | None = None) -> str:
    """The command that continues a run with the arguments that started it.

    Args:
        directory: of the run.
        arguments: of the command that started it; None takes those of this process.
    """
    program, *given = sys.argv if arguments is None else arguments
    kept = [argument for argument in given if argument.split("=")[0] not in {"run_dir", "resume"}]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["torchrun", "--nproc-per-node", processes] if processes != "1" else ["python"]
    start = program.split(" ") if started_by_octet([program]) else [*launcher, program]
    return shlex.join([*start, *kept, override("run_dir", str(directory)), "resume=true"])


def next_commands(config: Config, run: Run, arguments: Sequence[str] | None = None) -> list[dict[str, str]]:
    """What a reader of the report may want to do: title, command, remark.

    The commands are those of `octet` where it started the run, else the scripts and modules of the checkout.

    Args:
        config: of the run.
        run: its directory.
        arguments: of the command that started it; None takes those of this process.
    """
    programs = OCTET if started_by_octet(arguments) else CHECKOUT
    again, where = overrides(config), str(run.directory)
    rows = [
        (
            "Make this run again",
            "run",
            again,
            "in a new run directory; compare the hashes of weights and data",
        ),
        (
            "Continue this run",
            "run",
            [*again, override("run_dir", where), "resume=true"],
            "stages that are done are skipped",
        ),
        ("This page again", "report", [where], "from report.json alone; name two runs to compare"),
    ]
    if run.path(EXPORT_REPORT).exists():
        target = config.deploy.target
        others = ", ".join(name for name in TARGETS if name != target)
        rows += [
            ("Export", "export", [override("run", where), f"target={target}"], f"other targets: {others}"),
            ("See what it detects", "predict", [where, "IMAGE"], "image, folder or video"),
            (
                "Measure on other images",
                "evaluate",
                [where, "--data", "FOLDER"],
                "figures of images that took no part in any choice",
            ),
        ]
    return [
        {"title": title, "command": shlex.join([*programs[name].split(), *words]), "remark": remark}
        for title, name, words, remark in rows
    ]
