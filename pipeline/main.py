"""The main job: stages in order over one run directory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from configs.compose import dump
from configs.schema import Config
from core.errors import GateError
from core.failures import known_failure
from core.files import LATEST, check_writable
from pipeline.gates import check_gates, shipped_value
from pipeline.input_check import check_input
from pipeline.job import Job
from pipeline.run.commands import next_commands, resume_command
from pipeline.run.directory import Run
from pipeline.run.estimate import Estimate
from pipeline.run.progress import mute, say, show_package_logs
from pipeline.run.stopping import STOPPING, Stopped
from pipeline.run.terminal import print_result
from pipeline.stages.order import stages_of
from pipeline.stages.report import chosen_rows
from pipeline.stages.stage import Stage
from training.team import ALONE, Team, join_team


def run_job(config: Config) -> float:
    """Run the configured stages and return the AP of the shipped model (the value that sweeps optimise).

    In a resumed run directory a stage is skipped as long as everything that it read and wrote is the same; otherwise it
    runs again. Under torchrun the processes share the stages that can be divided; the first does the others, and the
    processes that are needed no more leave.

    Raises:
        GateError: a gate that the user set is missed (the report is written before).
        ConfigError, RunError, DataError, CheckpointError, DeployError: with value, expectation and remedy.
    """
    STOPPING.watch()
    show_package_logs()
    team = join_team()
    mute(not team.first)
    with team.reporting():
        return _run_stages(config, team)


def _run_stages(config: Config, team: Team) -> float:
    job = open_job(config, team)
    run = job.run
    stages = stages_of(config, run)
    say(f"run: {run.directory}")
    if team.size > 1:
        shared = ", ".join(stage.name for stage in stages if stage.is_shared) or "no stage"
        say(f"{team.size} processes share {shared}; the first process runs the other stages")
    try:
        run_stages(job, stages)
    except Stopped as stopped:
        say(f"Stopped by {stopped.name}. To continue: {resume_command(run.directory)}")
        raise
    except Exception as error:
        if known_failure(error) is not None and not isinstance(error, GateError):
            say(f"To continue after that: {resume_command(run.directory)}")
        raise
    finally:
        STOPPING.is_deferred = False
        if team.first:
            run.unlock()
    if not team.first:
        return math.nan
    print_result(run, next_commands(config, run), chosen_rows(job))
    check_gates(config, run.rows(), job.splits.task)
    return shipped_value(run.rows())


def run_stages(job: Job, stages: Sequence[Stage]) -> None:
    """Run the stages in order, each with its number and, if an earlier run allows it, an estimate of the time left.

    Other processes than the first leave after the last stage that they share.
    """
    run, config = job.run, job.config
    num_common = max((number for number, stage in enumerate(stages, 1) if stage.is_shared), default=0)
    estimate = Estimate(run, {stage.name: stage.chosen_settings(config) for stage in stages})
    for number, stage in enumerate(stages, 1):
        if number > num_common:
            if not job.team.first:
                return
            job.team = ALONE
        STOPPING.check()
        pending = [s.name for s in stages[number - 1 :] if s.is_always_run or not run.is_done(s.name)]
        seconds = run_stage(job, stage, f"[{number}/{len(stages)}] ", estimate.describe(pending))
        if seconds is not None:
            estimate.note(stage.name, seconds)


def run_stage(job: Job, stage: Stage, count: str = "", remark: str = "") -> float | None:
    """Run one stage, unless it is done: all that it read and wrote is as it was.

    Args:
        job: the job.
        stage: one of its stages.
        count: text in front of the stage's line.
        remark: text after it.

    Returns:
        Seconds; None where the stage was done before.
    """
    run, team = job.run, job.team
    inputs = stage.inputs(job) if team.first else None
    changes = team.share([] if inputs is None else stage.changes(job, inputs))
    if not changes and not stage.is_always_run:
        say(f"{count}{stage.name}: done before")
        if team.first:
            stage.tidy(run)
        return None
    again = team.first and run.is_done(stage.name) and not stage.is_always_run
    reason = f" again: {'; '.join(changes[:3])}" if again else ""
    say(f"{count}--- {stage.name}{reason}{remark}")
    started = time.perf_counter()
    if inputs is not None:
        stage.clear(job, inputs)
        run.ledger.start(stage.name, inputs)
    team.wait()
    if team.first or stage.is_shared:
        job.stage_team = team if stage.is_shared else ALONE
        stage.function(job)
        job.stage_team = ALONE
    seconds = time.perf_counter() - started
    if inputs is not None:
        run.ledger.finish(stage.name, inputs, stage.outputs(job), seconds)
        stage.tidy(run)
    team.wait()
    return seconds


def open_job(config: Config, team: Team) -> Job:
    """The job of a fresh or a resumed run directory, in every process.

    The first process checks the input, and only then makes the directory and writes config.yaml into it.
    """
    if not team.first:
        return Job(config, Run(Path(str(team.share(None)))), team)
    run = _choose_run(config)
    try:
        job = _checked_job(config, run, team)
        run.make(dump(config))
    except BaseException:
        run.unlock()
        raise
    team.share(str(run.directory))
    return job


def plan_job(config: Config) -> Job:
    """The job as `open_job` would open it, with all its checks; nothing is written, and nothing stays locked.

    Raises:
        ConfigError, RunError, DataError, CheckpointError, DeployError, WriteError: with value, expectation and remedy.
    """
    run = _choose_run(config)
    try:
        return _checked_job(config, run, ALONE)
    finally:
        run.unlock()


def _choose_run(config: Config) -> Run:
    """A new run directory, which is not made yet, or the locked one to resume."""
    given = Path(config.run_dir) if config.run_dir else None
    earlier = given or Path("runs") / config.experiment / LATEST
    if config.resume == "false" or (config.resume == "auto" and not Run.exists(earlier)):
        return Run.plan(given, config.experiment)
    run = Run.open(earlier)
    check_writable(run.directory)
    run.lock()
    return run


def _checked_job(config: Config, run: Run, team: Team) -> Job:
    run.ledger.records()  # refuses runs of other versions
    job = Job(config, run, team)
    check_input(job)
    return job
