"""`quant.swap_activation=auto`: which activation the network is fine-tuned with, decided by measurements before that.

A part of the stage `place`. Every candidate is calibrated, measured on the validation images and exported, and the
engines are timed alternately. Fine-tuning recovers a small loss of a swapped network and no large one
(docs/faster.md has the figures), so the loss after calibration decides which candidates can be used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.schema import Config
from core.choices import AUTO, CHEAP_ACTIVATIONS, INT8, SILU
from core.errors import ConfigError, DeployError
from core.names import listing
from core.rows import PTQ
from core.runtimes import RUNTIMES
from core.targets import TARGETS
from deploy import EngineRequest, Runtime, benchmark_alternately, build_engine, load_onnx, open_engine
from deploy.graph.quantizers import quantized_precision
from deploy.runtimes.engines import runtime_class
from pipeline.evaluation.measuring import measure_name, value_of
from pipeline.job import Job
from pipeline.networks import SWAPPED
from pipeline.run.files import target_of
from pipeline.run.progress import say
from pipeline.stages.calibration import calibrated
from pipeline.stages.export import check_export, range_images, targets, write_onnx
from quant import Placement

MEASURED = "activation-measured.json"
MAX_AP_LOSS = 0.03  # AP after calibration, or the user's metric, below that with SiLU
MIN_TIME_SAVED = 0.05  # share of the time with SiLU


@dataclass(frozen=True)
class Candidate:
    """A calibrated network with one activation.

    Attributes:
        activation: `silu`, or what replaces it.
        ap: accuracy after calibration, without fine-tuning; or the user's own metric.
        milliseconds: median latency of its INT8 engine.
    """

    activation: str
    ap: float
    milliseconds: float

    def reason_against(self, silu: Candidate) -> str | None:
        """Why it does not replace SiLU; None if it can."""
        if not self.ap >= silu.ap - MAX_AP_LOSS:
            return f"loses more than {MAX_AP_LOSS:g}"
        if not self.milliseconds <= silu.milliseconds * (1 - MIN_TIME_SAVED):
            return f"saves less than {MIN_TIME_SAVED:.0%} of the time"
        return None


def choose_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest candidate that is accurate enough and clearly faster than the first, SiLU; else SiLU."""
    silu = candidates[0]
    able = [one for one in candidates[1:] if one.reason_against(silu) is None]
    return min(able, key=lambda one: one.milliseconds, default=silu)


def check_measurable(job: Job) -> None:
    """Find out before any long work whether the candidates can be exported and timed.

    Raises:
        ConfigError, DeployError: see `timed_runtime` and `check_export`.
    """
    timed_runtime(job.config)
    check_export(job)


def timed_runtime(config: Config) -> str:
    """The runtime that the candidates are timed with: the first of `deploy.runtimes` that runs on this machine.

    Raises:
        ConfigError: none does.
    """
    reasons = []
    for name in config.deploy.runtimes:
        runtime = runtime_class(name)
        try:
            runtime.require(target_of(config, name))
        except DeployError as error:
            reasons.append(str(error))
            continue
        if runtime.can_run():
            return name
        reasons.append(f"{RUNTIMES[name].title} has no GPU here.")
    raise ConfigError(
        f"quant.swap_activation=auto times engines, and deploy.runtimes=[{','.join(config.deploy.runtimes)}]: expected "
        f"one that runs on this machine ({' '.join(reasons) or 'none is named'}); choose with "
        f"{' or '.join(f'quant.swap_activation={name}' for name in CHEAP_ACTIVATIONS)}, or run where the engine runs"
    )


def decide_activation(job: Job, make_placement: Callable[[Job], Placement]) -> None:
    """Measure every candidate, choose one, and keep the choice and its figures in the run directory.

    Args:
        job: the job.
        make_placement: gives the placement of the network that the job's `networks.student` is.

    Raises:
        ConfigError, DeployError: see `check_measurable`.
    """
    runtime, names = timed_runtime(job.config), candidates_of(job)
    target = target_of(job.config, runtime)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in names]
        values = [
            _prepare(job, name, make_placement, target, path) for name, path in zip(names, paths, strict=True)
        ]
        times = _time(job, runtime, paths)
    candidates = [Candidate(*item) for item in zip(names, values, times, strict=True)]
    silu, chosen = candidates[0], choose_candidate(candidates)
    measure = measure_name(job.config.metric.factory, job.splits.task)
    for one in candidates:
        reason = "chosen" if one is chosen else one.reason_against(silu) or "slower than the chosen one"
        say(
            f"activation {one.activation}: {measure} {one.ap:.4f} after calibration ({one.ap - silu.ap:+.4f}), median "
            f"{one.milliseconds:.2f} ms ({one.milliseconds / silu.milliseconds - 1:+.1%})"
            + ("" if one is silu and one is not chosen else f": {reason}")
        )
    job.run.write_json(
        MEASURED,
        {
            "measure": measure,
            "runtime": runtime,
            "subject": f"{RUNTIMES[runtime].title} on this machine",
            "batch": job.config.deploy.batch,
            "max_loss": MAX_AP_LOSS,
            "min_time_saved": MIN_TIME_SAVED,
            "candidates": [{**asdict(one), "is_chosen": one is chosen} for one in candidates],
        },
    )
    job.run.write_json(SWAPPED, {"activation": None if chosen is silu else chosen.activation})


def candidates_of(job: Job) -> list[str]:
    """Activations to measure, SiLU first: all that the graphs of the run can have.

    Hard-swish is left out for ONNX Runtime, which has no integer kernel for it.
    """
    unable = {"hardswish"} if any(TARGETS[name].result_quantizers for name in targets(job)) else set()
    names = [SILU, *(name for name in CHEAP_ACTIVATIONS if name not in unable)]
    left_out = f"; {listing(sorted(unable))} has no integer kernel in ONNX Runtime" if unable else ""
    say(f"quant.swap_activation=auto: {listing(names)} are calibrated, measured and timed{left_out}")
    return names


def _prepare(
    job: Job, name: str, make_placement: Callable[[Job], Placement], target: str, path: Path
) -> float:
    """Calibrate, measure and export the network with one activation; returns its accuracy."""
    with job.networks.swapped(None if name == SILU else name):
        model, _ = calibrated(job, make_placement(job))
        value = value_of(job.evaluator.measure(job.predictor(model), name))
        images = range_images(job) if TARGETS[target].wants_images else []
        write_onnx(job, model.cpu(), target, PTQ.name, path, images)
    return value


def _time(job: Job, runtime: str, paths: Sequence[Path]) -> list[float]:
    """Median milliseconds of the engines of some graphs, which run alternately."""
    config = job.config.deploy
    with ExitStack() as stack:
        engines: list[Runtime] = []
        for path in paths:
            request = EngineRequest(
                precision=quantized_precision(load_onnx(path)) or INT8,
                int8_hint=config.int8_hint,
                batch=config.batch,
                image_size=job.config.data.input_size,
                threads=config.threads or None,
            )
            if not RUNTIMES[runtime].reads_onnx:
                path = build_engine(runtime, path, path.parent / path.stem, request)
            engines.append(stack.enter_context(open_engine(runtime, path, request)))
        shape = (config.batch, 3, *job.config.data.input_size)
        reports = benchmark_alternately(engines, shape, config.benchmark_seconds, warmup=10)
    return [report.median_ms for report in reports]


def timed_where(config: Config) -> Mapping[str, str]:
    """What the times depend on in addition to the settings of calibration: a choice is made again for other engines."""
    if config.quant.swap_activation != AUTO:
        return {}
    return {"target and runtimes of deploy": " ".join([config.deploy.target, *config.deploy.runtimes])}
