"""The stages in their order, and which of them a configuration runs."""

from __future__ import annotations

from configs.schema import Config
from pipeline.run.directory import Run
from pipeline.stages.autotune import TUNE
from pipeline.stages.calibrate import CALIBRATE
from pipeline.stages.engine import ENGINE
from pipeline.stages.export import EXPORT
from pipeline.stages.finetuning import FINETUNE
from pipeline.stages.load import LOAD, MEASURE_FLOAT
from pipeline.stages.place import PLACE
from pipeline.stages.report import REPORT
from pipeline.stages.sensitivity import SENSITIVITY
from pipeline.stages.stage import Stage
from pipeline.stages.training import TRAIN_FLOAT

ORDER = (
    TRAIN_FLOAT, LOAD, MEASURE_FLOAT, PLACE, CALIBRATE, SENSITIVITY, TUNE, FINETUNE, EXPORT, ENGINE, REPORT,
)  # fmt: skip


def stages_of(config: Config, run: Run) -> list[Stage]:
    """The stages that a configuration runs: those it names, and what they cannot do without.

    `load` comes first unless the float model is trained in this run; `place` comes before `calibrate`; an accuracy
    budget and `autotune` bring `float` and `sensitivity` along.
    """
    wanted = set(config.stages)
    if "train" not in wanted and not run.is_done("train"):
        wanted.add("load")
    if "calibrate" in wanted:
        wanted.add("place")
        if config.quant.accuracy_budget is not None:
            wanted |= {"float", "sensitivity"}
    if "autotune" in wanted:
        wanted |= {"float", "sensitivity"}
    return [stage for stage in ORDER if stage.name in wanted]
