"""What is found out before any long work, and before a run directory is made: wrong settings, files, stages and code.

Cheap checks come first: a misspelt path is not to be found after an hour of decoding images.
"""

from __future__ import annotations

from pathlib import Path

import torch

from core.choices import AUTO
from core.errors import CheckpointError, ConfigError, RunError
from core.grid import Grid
from core.names import listing
from models import Detector, check_swappable, fold_detector, select_head
from pipeline.evaluation.measuring import SETTING as METRIC
from pipeline.job import Job
from pipeline.networks import FLOAT_MODEL
from pipeline.run.ledger import Inputs
from pipeline.stages.activation import check_measurable
from pipeline.stages.autotune import check_autotune
from pipeline.stages.engine import check_runtimes
from pipeline.stages.export import check_export, check_widths, targets
from pipeline.stages.order import ORDER, stages_of
from pipeline.stages.place import placed_by_rules
from pipeline.stages.recalibration import check_recalibration
from pipeline.user_code.factories import load_factory
from quant import feature_nodes, insert, load_placement


def check_input(job: Job) -> None:
    """Find wrong data, checkpoints, settings and stages.

    Raises:
        ConfigError, RunError, DataError, CheckpointError, DeployError: with value, expectation and remedy.
    """
    config = job.config
    names = {stage.name for stage in stages_of(config, job.run)}
    check_settings_of_others(job, names)
    check_needs(job, names)
    check_fine_tuned(job, names)
    if config.metric.factory is not None:
        load_factory(METRIC, config.metric.factory)
    check_weights(job, names)
    if config.quant.placement is not None and "place" in names:
        load_placement(Path(config.quant.placement))
    if "export" in names:
        check_export(job)
    if "engine" in names:
        check_runtimes(job)
    if "autotune" in names:
        check_autotune(job)
    if config.quant.swap_activation == AUTO and "place" in names and not job.run.is_done("place"):
        check_measurable(job)
    if {"train", "place", "calibrate", "finetune"} & names:
        job.splits.train  # noqa: B018 - opening verifies it
    if len(job.splits.val) < config.deploy.batch and {"export", "engine"} & names:
        raise ConfigError(
            f"deploy.batch={config.deploy.batch}, but the validation split has {len(job.splits.val)} images, on which "
            "engines are compared with torch: use a smaller batch"
        )
    if config.weights is None and "load" in names and config.model.factory is None:
        raise ConfigError(
            "weights is not set and `train` is not among the stages: only random weights could be "
            "quantized; add weights=FILE, or train first with stages=[train,...]"
        )
    initial = None if job.run.path(FLOAT_MODEL).exists() else job.networks.initial()
    if initial is not None and config.quant.swap_activation is not None:
        check_swappable(initial.network, config.quant.swap_activation)
    if initial is not None and config.quant.recalibrate_scores:
        check_recalibration(initial)
    check_names_of_network(job, names, initial)


def check_weights(job: Job, names: set[str]) -> None:
    """Find a misspelt path before the images are verified.

    Raises:
        CheckpointError: there is no file of that name.
    """
    weights = job.config.weights
    if weights is not None and {"train", "load"} & names and not Path(weights).is_file():
        raise CheckpointError(
            f"Checkpoint {weights} does not exist or is not a file; give the path of a weights file"
        )


def check_needs(job: Job, names: set[str]) -> None:
    """Refuse stages that build on others which have not run and are not to run.

    Raises:
        RunError: there is such a stage.
        ConfigError: a gate about a row that is not measured.
    """
    if job.config.max_ap_drop is not None and "float" not in names and not job.run.is_done("float"):
        raise ConfigError(
            f"max_ap_drop={job.config.max_ap_drop} compares with the float model, which is not measured: add float to "
            "stages, or use min_ap"
        )
    for stage in (stage for stage in ORDER if stage.name in names):
        needed = stage.needs(job.config) if callable(stage.needs) else stage.needs
        for missing in (name for name in needed if name not in names and not job.run.is_done(name)):
            order = [s.name for s in ORDER if s.name in {*job.config.stages, missing}]
            raise RunError(
                f"the stage `{stage.name}` needs what `{missing}` makes, which has not run: use "
                f"stages=[{','.join(order)}], or continue a run that has it (run_dir=DIRECTORY resume=true)"
            )


def check_fine_tuned(job: Job, names: set[str]) -> None:
    """Refuse to export a network with another activation that has not been fine-tuned, and is not to be.

    Raises:
        ConfigError: it would be exported.
    """
    swap = job.config.quant.swap_activation
    if swap is None or "export" not in names or "finetune" in names or job.run.is_done("finetune"):
        return
    raise ConfigError(
        f"quant.swap_activation={swap} with stages=[{','.join(job.config.stages)}]: a network with another activation "
        "loses accuracy until it is fine-tuned, and would be exported without that; add finetune to stages, leave the "
        "setting out, or leave export out to measure the loss alone"
    )


def check_names_of_network(job: Job, names: set[str], initial: Detector | None) -> None:
    """Find policy rules, a saved placement and distillation patterns that do not fit the network.

    Args:
        job: the job.
        names: stages that will run.
        initial: the detector that a fresh run starts from; None where the run has its float model already.

    Raises:
        PolicyError, PlacementError, DistillationError: they do not.
        ConfigError: the export is asked for, and no engine of a target runs the placement.
    """
    quant, qat = job.config.quant, job.config.qat
    narrow = min(quant.weights.bits, quant.activations.bits) < Grid().bits and "export" in names
    has_rules = bool(quant.policy or quant.float_patterns or quant.placement or narrow) and "place" in names
    has_patterns = bool(qat.distill_feature_names) and qat.distill_features > 0 and "finetune" in names
    if not has_rules and not has_patterns:
        return
    detector = job.networks.detector if initial is None else initial
    if initial is not None and job.networks.custom is None:  # as the stages will see it
        detector = select_head(fold_detector(initial), initial.deployed_head)
    with torch.no_grad():
        network = detector.network.eval()
        if has_rules and quant.placement is not None:
            placement = load_placement(Path(quant.placement))
            insert(network, placement, qat.learn_scales)
        elif has_rules:
            placement = placed_by_rules(quant, network)
        if has_rules and "export" in names:
            for target in targets(job):
                check_widths(placement, target)
        if has_patterns:
            feature_nodes(network, tuple(qat.distill_feature_names))


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
