"""The main job: stages in order over one run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.compose import dump, read
from configs.schema import STAGES, Config
from core.errors import ConfigError, RunError
from pipeline.evaluation.measuring import row_value
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.run.progress import mute, say, show_room_logs
from pipeline.run.terminal import print_result, quit_on_termination
from pipeline.stages.engine import check_runtimes, engine_stage
from pipeline.stages.export import check_export
from pipeline.stages.finetuning import finetune_stage
from pipeline.stages.fixed_point import export_and_compare
from pipeline.stages.quantizing import calibrate_stage, float_stage, place_stage
from pipeline.stages.report import check_gates, report_stage
from pipeline.stages.sensitivity import sensitivity_stage
from pipeline.stages.training import train_stage
from training.team import Team, join_team

RUN_STAGES: dict[str, Callable[[Job], None]] = {
    "train": train_stage,
    "float": float_stage,
    "place": place_stage,
    "calibrate": calibrate_stage,
    "sensitivity": sensitivity_stage,
    "finetune": finetune_stage,
    "export": export_and_compare,
    "engine": engine_stage,
    "report": report_stage,
}

SHARED_STAGES = frozenset(
    {"calibrate"}
)  # a team's processes work on these together; the first does all others


def run_job(config: Config) -> float:
    """Run the configured stages and return the AP of the shipped model (the value that sweeps optimise).

    A stage that has finished in a resumed run directory is skipped; asking for a stage anew needs a fresh one. Under
    torchrun calibration is shared among the processes, and the first does everything else.

    Raises:
        GateError: a gate that the user set is missed (the report is written before).
        ConfigError, RunError, DataError, CheckpointError, DeployError: with value, expectation and remedy.
    """
    quit_on_termination()
    show_room_logs()
    team = join_team()
    mute(not team.first)
    job = Job(config, _open_together(config, team), team)
    run = job.run
    if team.first:
        check_input(job)
    say(f"run: {run.directory}")
    if team.size > 1:
        say(f"{team.size} processes: they share the calibration images; the first does all other stages")
    for stage in config.stages:
        if stage != "report" and team.share(run.is_done(stage)):
            say(f"{stage}: done before")
            continue
        say(f"--- {stage}")
        started = time.perf_counter()
        if team.first or stage in SHARED_STAGES:
            RUN_STAGES[stage](job)
        if team.first:
            run.mark_done(stage, time.perf_counter() - started)
        team.wait()
    if team.first:
        print_result(run)
        check_gates(job)
    return shipped_ap(run)


def _open_together(config: Config, team: Team) -> Run:
    """The run directory that the first process makes or opens, in every process."""
    run = open_run(config) if team.first else None
    directory = team.share(None if run is None else str(run.directory))
    return run if run is not None else Run(Path(str(directory)))


def open_run(config: Config) -> Run:
    """Make a fresh run directory, or open the one to resume.

    Raises:
        RunError: nothing to resume, or a directory with another configuration in it.
    """
    if not config.resume:
        run = Run.create(Path(config.run_dir) if config.run_dir else None, config.experiment)
        run.write_text(CONFIG, dump(config))
        return run
    directory = Path(config.run_dir) if config.run_dir else Path("runs") / config.experiment / "latest"
    run = Run.open(directory)
    made_with = read(run.path(CONFIG))
    differing = different_keys(dataclasses.asdict(made_with), dataclasses.asdict(config))
    if differing:
        raise RunError(
            f"resume=true, but {run.directory} was made with other settings ({', '.join(differing[:5])}): repeat "
            "that command, or start a new run"
        )
    return run


def different_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ, those aside that may change between tries."""
    free = {"resume", "run_dir", "stages", "threads", "device", "deploy", "min_ap", "max_ap_drop"}
    keys = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if (not prefix and key in free) or a == b:
            continue
        nested = isinstance(a, dict) and isinstance(b, dict)
        keys += different_keys(a, b, f"{prefix}{key}.") if nested else [prefix + key]  # type: ignore[arg-type]
    return keys


def check_input(job: Job) -> None:
    """Find wrong data, checkpoints and stages within seconds, before any long work."""
    unknown = [stage for stage in job.config.stages if stage not in RUN_STAGES]
    if unknown:
        raise ConfigError(f"stages={job.config.stages}: {unknown[0]!r} is not one of {', '.join(STAGES)}")
    if "export" in job.config.stages:
        check_export(job)
    if "engine" in job.config.stages and not job.run.is_done("engine"):
        check_runtimes(job)
    if {"train", "place", "calibrate", "finetune"} & set(job.config.stages):
        job.train_set  # noqa: B018 - opening verifies it
    job.val_set  # noqa: B018
    if not job.run.path("float.safetensors").exists():
        job.initial_detector()


def shipped_ap(run: Run) -> float:
    """AP (or the user's metric) of the INT8 engine, else of the last torch row; NaN where nothing was measured."""
    rows = {row["name"]: row_value(row) for row in run.rows()}
    for name in [*(n for n in rows if n.endswith(":int8")), "qat", "ptq", "float"]:
        value = rows.get(name)
        if value is not None:
            return value
    return float("nan")
