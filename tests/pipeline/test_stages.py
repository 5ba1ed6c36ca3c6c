"""When a stage runs again: a setting, a file or the data that it reads has changed, and it says which."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import STAGES, Config
from core.errors import RunError
from pipeline.input_check import check_settings_of_others
from pipeline.main import run_stage
from pipeline.run.directory import Run
from pipeline.run.ledger import Ledger
from pipeline.stages.order import ORDER, stages_of
from pipeline.stages.stage import Stage, flat_settings
from training.team import ALONE

REPOSITORY = Path(__file__).resolve().parents[2]


class Splits:
    """Data that is told by a word."""

    def __init__(self) -> None:
        self.content = "images"

    def digest(self, split: str) -> str:
        return f"{split} of {self.content}"


class SmallJob:
    """What running a stage needs."""

    team = ALONE

    def __init__(self, directory: Path) -> None:
        self.config = Config(experiment="x")
        self.run = Run(directory)
        self.splits = Splits()
        self.calls: list[str] = []


def write(*names: str) -> Callable[[Any], None]:
    """A stage's function that writes files and notes its call."""

    def function(job: Any) -> None:
        job.calls.append(names[0])
        for name in names:
            job.run.write_text(name, f"{name} {job.config.quant.observer} {job.config.seed}")

    return function


FIRST = Stage(
    "float", write("first.txt"), settings=("seed", "quant.weights"), splits=("val",), writes=("first.txt",)
)
SECOND = Stage(
    "calibrate",
    write("second.txt", "parts/a.json"),
    settings=("quant",),
    ignored=("quant.percentile",),
    reads=("first.txt", "extra.txt"),
    writes=("second.txt", "parts/*.json"),
)


@pytest.fixture
def job(tmp_path: Path) -> Any:
    made: Any = SmallJob(tmp_path)
    run_all(made)
    assert made.calls == ["first.txt", "second.txt"]
    made.calls.clear()
    return made


def run_all(job: Any) -> list[str]:
    job.calls.clear()
    for stage in (FIRST, SECOND):
        run_stage(job, stage)
    return list(job.calls)


def test_nothing_runs_again_where_nothing_has_changed(job: Any) -> None:
    assert run_all(job) == []


def test_a_setting_reruns_its_readers_and_says_so(job: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job.config.quant.observer = "minmax"
    assert run_all(job) == ["second.txt"]
    assert "calibrate again: quant.observer is minmax, was mse" in capfd.readouterr().err
    assert job.run.path("second.txt").read_text() == "second.txt minmax 0"
    assert run_all(job) == []


def test_a_rerun_takes_along_what_reads_its_result(job: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job.config.seed = 5
    assert run_all(job) == ["first.txt", "second.txt"]
    assert "calibrate again: first.txt has changed" in capfd.readouterr().err


def test_settings_that_it_does_not_read_change_nothing(job: Any) -> None:
    job.config.quant.percentile = 99.0
    job.config.qat.epochs = 77
    job.config.data.workers = 3
    assert run_all(job) == []


def test_data_files_and_results_count(job: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job.splits.content = "other images"
    assert run_all(job) == ["first.txt"]  # with the same result, so the second has nothing new to read
    job.run.write_text("extra.txt", "new")
    assert run_all(job) == ["second.txt"]
    job.run.path("parts/a.json").write_text("edited")
    assert run_all(job) == ["second.txt"]
    job.run.path("second.txt").unlink()
    assert run_all(job) == ["second.txt"]
    err = capfd.readouterr().err
    for reason in (
        "val split has changed",
        "extra.txt is new",
        "parts/a.json was changed",
        "second.txt is missing",
    ):
        assert reason in err


def test_facts_of_the_machine_count(job: Any, capfd: pytest.CaptureFixture[str]) -> None:
    gpus = ["none"]
    stage = Stage(
        "engine", write("engine.txt"), machine=lambda _: {"this machine": gpus[0]}, writes=("engine.txt",)
    )
    for found in ("none", "none", "one"):
        gpus[0] = found
        run_stage(job, stage)
    assert job.calls == ["engine.txt", "engine.txt"]
    assert "engine again: this machine has changed" in capfd.readouterr().err


def test_what_an_earlier_run_left_is_gone_before_the_next(job: Any) -> None:
    job.run.write_text("parts/old.json", "{}")
    job.config.quant.observer = "minmax"
    run_all(job)
    assert [path.name for path in job.run.path("parts").iterdir()] == ["a.json"]
    assert job.run.path("previous/second.txt").read_text() == "second.txt mse 0"  # hours of work are not lost
    assert sorted(path.name for path in job.run.path("previous/parts").iterdir()) == ["a.json", "old.json"]


def test_an_edited_file_reruns_its_readers_only(tmp_path: Path) -> None:
    job: Any = SmallJob(tmp_path)
    plan = Stage(
        "place", write("plan.yaml"), settings=("seed",), writes=("plan.yaml",), editable=("plan.yaml",)
    )
    reader = Stage("calibrate", write("scales.txt"), reads=("plan.yaml",), writes=("scales.txt",))
    for stage in (plan, reader):
        run_stage(job, stage)
    job.run.path("plan.yaml").write_text("edited by hand")
    for stage in (plan, reader):
        run_stage(job, stage)
    assert job.calls == ["plan.yaml", "scales.txt", "scales.txt"]
    assert job.run.path("plan.yaml").read_text() == "edited by hand"
    job.config.seed = 1  # the placement is made anew: the edited one is kept beside it
    run_stage(job, plan)
    assert job.run.path("plan.yaml").read_text() == "plan.yaml mse 1"
    assert job.run.path("plan-edited.yaml").read_text() == "edited by hand"


def test_a_file_of_a_killed_stage_is_not_taken_for_an_edited_one(tmp_path: Path) -> None:
    """Killed behind the writing of the placement and before the mark: the next start writes it again, once."""
    job: Any = SmallJob(tmp_path)

    def killed(job: Any) -> None:
        job.run.ledger.announce("place", {"plan.yaml": hashlib.sha256(b"the plan").hexdigest()})
        job.run.write_text("plan.yaml", "the plan")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_stage(job, Stage("place", killed, writes=("plan.yaml",), editable=("plan.yaml",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml", "state.json"]
    job.run.path("plan.yaml").write_text("edited by hand")  # while the run was stopped
    run_stage(job, Stage("place", write("plan.yaml"), writes=("plan.yaml",), editable=("plan.yaml",)))
    assert job.run.path("plan-edited.yaml").read_text() == "edited by hand"


def test_partial_work_is_kept_for_the_same_inputs_only(tmp_path: Path) -> None:
    job: Any = SmallJob(tmp_path)
    seen: list[bool] = []

    def stop(job: Any) -> None:
        seen.append(job.run.path("state.pt").exists())
        job.run.write_text("state.pt", "half")
        raise KeyboardInterrupt

    stage = Stage("finetune", stop, settings=("seed",), writes=("out.txt",), partial=("state.pt",))
    for seed in (0, 0, 1):
        job.config.seed = seed
        with pytest.raises(KeyboardInterrupt):
            run_stage(job, stage)
    assert seen == [False, True, False]
    assert not job.run.is_done("finetune")


def test_partial_work_survives_a_change_of_an_adjustable_setting(tmp_path: Path) -> None:
    """As a lowered learning rate after a divergence."""
    job: Any = SmallJob(tmp_path)
    seen: list[bool] = []

    def stop(job: Any) -> None:
        seen.append(job.run.path("states/1.pt").exists())
        job.run.write_text("states/1.pt", "half")
        raise KeyboardInterrupt

    stage = Stage(
        "finetune",
        stop,
        settings=("seed", "qat"),
        partial=("states/*.pt",),
        adjustable=("qat.learning_rate",),
    )
    for rate, epochs in ((1e-3, 5), (1e-4, 5), (1e-4, 5), (1e-5, 6)):
        job.config.qat.learning_rate, job.config.qat.epochs = rate, epochs
        with pytest.raises(KeyboardInterrupt):
            run_stage(job, stage)
    assert seen == [False, True, True, False]


def test_partial_work_goes_when_the_stage_is_marked_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: Any = SmallJob(tmp_path)

    def work(job: Any) -> None:
        job.calls.append("again" if job.run.path("states/1.pt").exists() else "new")
        for name in ("states/1.pt", "log.txt", "out.txt"):
            job.run.write_text(name, name)

    stage = Stage("finetune", work, writes=("out.txt", "log.txt"), partial=("states/*.pt", "log.txt"))
    finish = Ledger.finish
    monkeypatch.setattr(Ledger, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed in the last lines
        run_stage(job, stage)
    monkeypatch.setattr(Ledger, "finish", lambda *inputs: [finish(*inputs), exec("raise KeyboardInterrupt")])
    with pytest.raises(KeyboardInterrupt):  # killed right behind them
        run_stage(job, stage)
    assert job.run.path("states/1.pt").exists()
    monkeypatch.undo()
    run_stage(job, stage)
    assert job.calls == ["new", "again"]
    assert not job.run.path("states/1.pt").exists()
    assert job.run.path("log.txt").exists()


def test_runs_of_other_versions_are_refused_and_left_alone(tmp_path: Path) -> None:
    old = json.dumps([{"name": "float", "seconds": 1.0}])
    (tmp_path / "state.json").write_text(old)
    with pytest.raises(RunError, match=r"another version of Octet .* nothing in it was changed"):
        Run(tmp_path).ledger.records()
    assert (tmp_path / "state.json").read_text() == old


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', '{"format": 2, "stages": {"float": 3}}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(RunError, match=r"state\.json is damaged"):
        Run(tmp_path).ledger.records()


def test_a_stage_that_stays_as_it_is_must_have_the_same_settings(tmp_path: Path) -> None:
    job: Any = SmallJob(tmp_path)
    job.run.ledger.finish("calibrate", calibrate_inputs(job), {}, 1.0)
    check_settings_of_others(job, {"engine"})
    job.config.quant.observer = "minmax"
    check_settings_of_others(job, {"calibrate", "engine"})
    with pytest.raises(RunError, match=r"`calibrate`.*quant\.observer is minmax, was mse.*add it to stages"):
        check_settings_of_others(job, {"engine"})


def calibrate_inputs(job: Any) -> Any:
    from pipeline.run.ledger import Inputs

    stage = next(stage for stage in ORDER if stage.name == "calibrate")
    return Inputs(stage.chosen_settings(job.config), {})


# -- the declarations


def test_every_stage_of_the_setting_is_declared_in_its_order() -> None:
    assert [stage.name for stage in ORDER if stage.name != "load"] == list(STAGES)


def test_what_a_stage_reads_an_earlier_one_writes() -> None:
    written: set[str] = set()
    for stage in ORDER:
        missing = set(stage.reads) - written
        assert not missing, f"{stage.name} reads {missing}, which no stage before it writes"
        written |= set(stage.writes)


def test_declared_settings_exist() -> None:
    config = Config(experiment="x")
    for stage in ORDER:
        for name in (*stage.chosen_settings(config), *stage.ignored, *stage.files, *stage.adjustable):
            flat_settings(config, name)


def test_no_two_stages_write_the_same_file() -> None:
    writers: dict[str, list[str]] = {}
    for stage in ORDER:
        for name in stage.writes:
            writers.setdefault(name, []).append(stage.name)
    several = {name: stages for name, stages in writers.items() if len(stages) > 1}
    assert set(map(tuple, several.values())) <= {("train", "load")}  # one or the other makes the float model


def test_stages_bring_along_what_they_need(tmp_path: Path) -> None:
    config = Config(experiment="x", stages=["calibrate", "export"])
    run = Run(tmp_path)
    assert [stage.name for stage in stages_of(config, run)] == ["load", "place", "calibrate", "export"]
    config.quant.accuracy_budget = 0.01
    names = [stage.name for stage in stages_of(config, run)]
    assert names == ["load", "float", "place", "calibrate", "sensitivity", "export"]
    config.stages = ["train", "calibrate"]
    config.quant.accuracy_budget = None
    assert [stage.name for stage in stages_of(config, run)] == ["train", "place", "calibrate"]


def test_a_saved_model_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    """safetensors writes several metadata keys in any order; one process in two would give another file."""
    script = (
        "import sys, torch; from pathlib import Path; from types import SimpleNamespace as S\n"
        "from pipeline.networks import Networks; from core.rows import PTQ; from quant import Placement\n"
        "model = torch.nn.Linear(2, 2); torch.nn.init.ones_(model.weight); torch.nn.init.ones_(model.bias)\n"
        "run = S(path=lambda name: Path(sys.argv[1]))\n"
        "Networks(None, run, None, None).save(model, Placement((), ()), PTQ)\n"
    )
    contents = set()
    for index in range(4):
        path = tmp_path / f"{index}.safetensors"
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, cwd=REPOSITORY)
        contents.add(path.read_bytes())
    assert len(contents) == 1
