"""What calibrates a network of the run: its images, methods and ranges by the section `quant`, for several stages."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from core.errors import ConfigError
from pipeline.job import Job
from pipeline.run.progress import say
from quant import CalibrationResult, Placement, Share, calibrate, equalize, insert
from training.team import ALONE


def calibrated(job: Job, placement: Placement) -> tuple[fx.GraphModule, CalibrationResult]:
    """The network to quantize with the quantizers of a placement and every scale chosen, without repairs.

    The processes of a shared stage share the images.
    """
    config, team = job.config.quant, job.stage_team
    model = insert(prepared_network(job), placement, job.config.qat.learn_scales).to(job.device).eval()
    images, ranges = calibration_images(job), imported_ranges(job)
    share = Share(team.gather, team.rank, team.size, config.calibration_batch_size)
    result = calibrate(model, images, config.observer, weight_method(job), config.percentile, share, ranges)
    return model, result


def prepared_network(job: Job) -> nn.Module:
    """The float network that is quantized: the run's, or its equalised copy."""
    if not job.config.quant.equalize:
        return job.networks.student
    result = equalize(job.networks.student)
    say(
        f"equalised {len(result.pairs)} pairs of layers; {len(result.left_alone)} left alone, since the activation "
        "between them is not homogeneous"
    )
    return result.network


def weight_method(job: Job) -> str:
    """How weight scales are chosen: the range for observer=minmax, else the least squared error."""
    return "minmax" if job.config.quant.observer == "minmax" else "mse"


def calibration_images(job: Job, limit: int | None = None) -> Iterator[Tensor]:
    """Letterboxed training images, spread evenly over the split, on the device; in a shared stage this process's share.

    At most `quant.calibration_images` and `data.limit_train` of them. With a limit at most as many, the same in every
    process and without a progress bar.
    """
    config = job.config.quant
    limits = (config.calibration_images, job.config.data.limit_train, limit)
    count = min(number for number in limits if number is not None)
    team = job.stage_team if limit is None else ALONE
    loader = job.splits.letterboxed(
        job.splits.train, config.calibration_batch_size, count, team, whole_batches=True
    )
    return job.splits.images(loader, "calibrate" if limit is None else None, job.networks.memory_format)


def imported_ranges(job: Job) -> dict[str, Tensor]:
    """Ranges that the float weights brought along from a quantized checkpoint, if the settings ask for them.

    Raises:
        ConfigError: equalisation would move the ranges.
    """
    ranges = job.networks.detector.amax
    if ranges and job.config.quant.imported_ranges == "ignore":
        say(f"imported ranges: {len(ranges)} ignored (quant.imported_ranges=ignore)")
        return {}
    if ranges and job.config.quant.equalize:
        raise ConfigError(
            f"quant.equalize=true moves ranges between channels, and the weights bring {len(ranges)} ranges of their "
            "own: add quant.imported_ranges=ignore, or use quant.equalize=false"
        )
    return ranges
