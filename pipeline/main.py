"""The main job: stages in order over one run directory."""

from __future__ import annotations

import time
from pathlib import Path

from configs.compose import dump
from configs.schema import Config
from core.errors import ConfigError, RunError
from core.names import listing
from pipeline.gates import check_gates, shipped_value
from pipeline.job import Job
from pipeline.networks import FLOAT_MODEL
from pipeline.run.directory import CONFIG, Run
from pipeline.run.ledger import Inputs
from pipeline.run.progress import mute, say, show_package_logs
from pipeline.run.terminal import print_result, quit_on_termination
from pipeline.stages.autotune import check_autotune
from pipeline.stages.engine import check_runtimes
from pipeline.stages.export import check_export
from pipeline.stages.order import ORDER, stages_of
from pipeline.stages.recalibration import check_recalibration
from pipeline.stages.stage import Stage
from training.team import Team, join_team


def run_job(config: Config) -> float:
    """Run the configured stages and return the AP of the shipped model (the value that sweeps optimise).

    In a resumed run directory a stage is skipped as long as everything that it read and wrote is the same; otherwise it
    runs again. Under torchrun calibration is shared among the processes, and the first does everything else.

    Raises:
        GateError: a gate that the user set is missed (the report is written before).
        ConfigError, RunError, DataError, CheckpointError, DeployError: with value, expectation and remedy.
    """
    quit_on_termination()
    show_package_logs()
    team = join_team()
    mute(not team.first)
    job = open_job(config, team)
    run = job.run
    stages = stages_of(config, run)
    say(f"run: {run.directory}")
    if team.size > 1:
        say(f"{team.size} processes: they share the calibration images; the first does all other stages")
    for stage in stages:
        run_stage(job, stage)
    if team.first:
        print_result(run)
        check_gates(config, run.rows(), job.splits.task)
    return shipped_value(run.rows())


def run_stage(job: Job, stage: Stage) -> None:
    """Run one stage, unless it is done: all that it read and wrote is as it was."""
    run, team = job.run, job.team
    inputs = stage.inputs(job) if team.first else None
    changes = team.share([] if inputs is None else stage.changes(job, inputs))
    if not changes and not stage.is_always_run:
        say(f"{stage.name}: done before")
        return
    again = team.first and run.is_done(stage.name) and not stage.is_always_run
    say(f"--- {stage.name}" + (f" again: {'; '.join(changes[:3])}" if again else ""))
    started = time.perf_counter()
    if inputs is not None:
        stage.clear(job, inputs)
        run.ledger.start(stage.name, inputs)
    team.wait()
    if team.first or stage.is_shared:
        stage.function(job)
    if inputs is not None:
        run.ledger.finish(stage.name, inputs, stage.outputs(job), time.perf_counter() - started)
    team.wait()


def open_job(config: Config, team: Team) -> Job:
    """The job of a fresh or a resumed run directory, in every process.

    The first process checks the input, and only then makes the directory and writes config.yaml into it.
    """
    if not team.first:
        return Job(config, Run(Path(str(team.share(None)))), team)
    given = Path(config.run_dir) if config.run_dir else None
    if config.resume:
        run = Run.open(given or Path("runs") / config.experiment / "latest")
        run.ledger.records()  # refuses runs of other versions
    else:
        run = Run.plan(given, config.experiment)
    job = Job(config, run, team)
    check_input(job)
    run.make()
    run.write_text(CONFIG, dump(config))
    team.share(str(run.directory))
    return job


def check_input(job: Job) -> None:
    """Find wrong data, checkpoints and stages within seconds, before any long work."""
    names = {stage.name for stage in stages_of(job.config, job.run)}
    check_settings_of_others(job, names)
    if "export" in names:
        check_export(job)
    if "engine" in names:
        check_runtimes(job)
    if "autotune" in names:
        check_autotune(job)
    if {"train", "place", "calibrate", "finetune"} & names:
        job.splits.train  # noqa: B018 - opening verifies it
    job.splits.val  # noqa: B018
    if job.config.weights is None and "load" in names and job.config.model.factory is None:
        raise ConfigError(
            "weights is not set and `train` is not among the stages: there would be nothing but random weights to "
            "quantize; add weights=FILE, or train first with stages=[train,...]"
        )
    if not job.run.path(FLOAT_MODEL).exists():
        detector = job.networks.initial()
        if job.config.quant.recalibrate_scores:
            check_recalibration(detector)


def check_settings_of_others(job: Job, names: set[str]) -> None:
    """Refuse to build on a stage that ran with other settings and is not to run again.

    Raises:
        RunError: there is one; the message has its settings.
    """
    for stage in ORDER:
        record = job.run.ledger.get(stage.name)
        if record is None or not record.is_done or stage.name in names or stage.is_always_run:
            continue
        now = stage.chosen_settings(job.config)
        changes = record.inputs.changes(Inputs(now, record.inputs.reads))
        if changes:
            raise RunError(
                f"resume=true, but the stage `{stage.name}` of {job.run.directory} ran with other settings "
                f"({listing(changes, 3)}) and is not among the stages: add it to stages, or use its settings"
            )
