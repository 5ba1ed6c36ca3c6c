"""Command-line entries: from argv to a typed configuration, and from errors to exit codes.

    @hydra_entry()
    def main(config: Config) -> float: ...

    if __name__ == "__main__":
        main()

This uses Hydra, so `-m` sweeps, `--cfg job`, `--help` and shell completion work. Differences from a
plain `hydra.main`: mistakes end in one message and exit code 2 (HYDRA_FULL_ERROR=1 shows the traceback), and
the function receives a dataclass instead of a DictConfig.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs.compose import CONFIG_DIR, HYDRA_VERSION_BASE, SCHEMAS, explain, load, register_configs
from configs.help import help_text
from configs.overrides import check_overrides
from configs.schema import Config
from configs.sweep import JobRecord, SweepJob, take_jobs
from configs.trust import check_config_dirs
from core.command import discard_output
from core.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_CONFIG,
    EXIT_DEFECT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    OctetError,
)
from core.failures import known_failure

_FULL_ERROR = "HYDRA_FULL_ERROR"

Function = Callable[[Any], float | None]
AfterSweep = Callable[[Sequence[SweepJob]], None]


def hydra_entry(
    config_name: str = "config",
    after_sweep: AfterSweep | None = None,
) -> Callable[[Function], Callable[[], None]]:
    """Make a command-line entry of a function that takes a typed configuration.

    Args:
        config_name: "config" (the function takes `Config`) or "export" (`ExportConfig`).
        after_sweep: Called once at the end of a `-m` sweep with all its jobs, those that failed included.

    Returns:
        A decorator. The decorated function takes no arguments, reads `sys.argv`, and ends the process with an
        exit code where something went wrong: that of the `OctetError`, or 130 for Ctrl-C. Any other exception passes
        through with its traceback. In a sweep a job that fails in one of these ways does not stop the others; the
        process then ends with the highest of their codes.
    """

    def decorate(function: Function) -> Callable[[], None]:
        @functools.wraps(function)
        def entry() -> None:
            full_error = os.environ.get(_FULL_ERROR, "0") == "1"
            try:
                _run(function, config_name, full_error, after_sweep)
                sys.stdout.flush()
            except (ConfigError, HydraException, OmegaConfBaseException, YAMLError) as error:
                if full_error:
                    raise
                text = str(error) if isinstance(error, ConfigError) else explain(error, SCHEMAS[config_name])
                _stop(text, EXIT_CONFIG)
            except OctetError as error:
                if full_error:
                    raise
                _stop(str(error), error.exit_code)
            except BrokenPipeError:
                discard_output()
                raise SystemExit(EXIT_BROKEN_PIPE) from None
            except Exception as error:
                known = known_failure(error)
                if full_error or known is None:
                    raise
                _stop(str(known), known.exit_code)
            except KeyboardInterrupt:
                _stop("Interrupted.", EXIT_INTERRUPTED)

        return entry

    return decorate


def _run(
    function: Function,
    config_name: str,
    full_error: bool,
    after_sweep: AfterSweep | None,
) -> None:
    """Check argv, then let Hydra compose and call `function` once, or once per job of a sweep."""
    arguments, unknown = get_args_parser().parse_known_args()
    if arguments.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m under torchrun: a job of a sweep is one process; start the sweep without torchrun"
        )
    if unknown:
        raise ConfigError(
            f"Unknown argument '{unknown[0]}': settings are written KEY=VALUE, flags are listed by --help."
        )
    schema = SCHEMAS[config_name]
    extra_dirs = _extra_dirs(arguments)
    check_config_dirs(extra_dirs, "trust=true" in arguments.overrides)
    config_dirs = [CONFIG_DIR, *extra_dirs]
    if arguments.help:
        print(help_text(config_name, Path(sys.argv[0]).name, config_dirs))
        return
    if not arguments.shell_completion:  # takes install=SHELL, which is not a setting
        check_overrides(arguments.overrides, schema, config_dirs, arguments.multirun)
    register_configs()
    previous = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises instead of printing and leaving by itself
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*hydra.searchpath.*", category=UserWarning)
            hydra.main(version_base=HYDRA_VERSION_BASE, config_path=str(CONFIG_DIR), config_name=config_name)(
                functools.partial(_run_job, function=function, schema=schema, full_error=full_error)
            )()
    except Exception as error:
        jobs = _end_sweep(after_sweep)
        if all(job.exit_code is not None for job in jobs):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _stop(f"{sum(job.has_failed for job in jobs)} job(s) of the sweep failed ({reason}).", _highest(jobs))
    finally:
        if previous is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = previous
    jobs = _end_sweep(after_sweep)
    if any(job.has_failed for job in jobs):
        _stop(f"{sum(job.has_failed for job in jobs)} job(s) of the sweep failed.", _highest(jobs))


def _run_job(cfg: DictConfig, function: Function, schema: type, full_error: bool) -> float | None:
    """Run one job, with a record of its end where it is one of a sweep; the other jobs of a sweep still run."""
    record = JobRecord() if HydraConfig.get().mode == RunMode.MULTIRUN else None
    try:
        config = load(cfg, schema)
        if record is not None and isinstance(config, Config):
            config = _in_sweep(config)
        result = function(config)
    except BaseException as error:
        known = known_failure(error)
        if record is not None:
            record.end(*_outcome(known or error))
        if full_error or known is None:
            raise
        if record is None:  # Hydra passes SystemExit on and prints nothing
            _stop(str(known), known.exit_code)
        print(f"error: {known}", file=sys.stderr)
        return None
    if record is not None:
        record.end(EXIT_OK)
    return result


def _outcome(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a job that failed."""
    if isinstance(error, OctetError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, f"ended with exit code {error.code}"
    return EXIT_DEFECT, f"{type(error).__name__}: {error}"


def _end_sweep(after_sweep: AfterSweep | None) -> list[SweepJob]:
    """The jobs of the sweep that has ended; none where there was no sweep."""
    jobs = take_jobs()
    if jobs and after_sweep is not None:
        after_sweep(jobs)
    return jobs


def _highest(jobs: Sequence[SweepJob]) -> int:
    """The highest exit code; a job that was ended from outside counts as a defect."""
    return max(EXIT_DEFECT if job.exit_code is None else job.exit_code for job in jobs)


def _extra_dirs(arguments: argparse.Namespace) -> list[Path]:
    """Folders of settings that are not Octet's, as the command line names them.

    Raises:
        ConfigError: an argument that would replace Octet's own tree, or run what a pickle file says.
    """
    for flag in ("experimental_rerun", "config_path", "config_name"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')} is not supported: use --config-dir with +experiment=NAME."
            )
    found = [Path(arguments.config_dir)] if arguments.config_dir else []
    for text in arguments.overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+") == "hydra.searchpath":
            places = [place.strip(" '\"") for place in value.strip(" []").split(",")]
            found += [
                Path(place.removeprefix("file://")) for place in places if not place.startswith("pkg://")
            ]
    return found


def _in_sweep(config: Config) -> Config:
    """Give a job of a sweep its own run directory: the one Hydra made for it."""
    if config.run_dir is not None:
        raise ConfigError(
            f"run_dir={config.run_dir} in a sweep: every job would write there; use hydra.sweep.dir=PATH."
        )
    config.run_dir = HydraConfig.get().runtime.output_dir
    return config


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        print(f"exit code {code}; torchrun itself ends with 1, whatever the code", file=sys.stderr)
    raise SystemExit(code)
