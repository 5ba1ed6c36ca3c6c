"""Code that files of strangers name: run directories, trees of settings, factories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import compose, dump, read
from core.errors import ConfigError
from pipeline.evaluate import main as evaluate
from pipeline.predict import main as predict
from pipeline.user_code.factories import load_factory

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = "# @package _global_\ndefaults: [demo, _self_]\n"


def run_entry(entry: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / entry), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return tmp_path / "victim.txt"


@pytest.fixture
def stranger(tmp_path: Path, victim: Path) -> Path:
    """A run directory whose dataset factory is a shell, and whose split is a command; it claims to be trusted."""
    run = tmp_path / "run"
    run.mkdir()
    config = compose(["+experiment=demo", "stages=[float]"])
    config.data.factory, config.data.val_split, config.trust = "subprocess:getoutput", f"touch {victim}", True
    (run / "config.yaml").write_text(dump(config))
    (run / "float.safetensors").write_bytes(b"")
    return run


def test_a_run_directory_of_a_stranger_runs_nothing(
    stranger: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    assert predict([str(stranger), str(picture), "--out", str(tmp_path / "out")]) == 2
    assert evaluate([str(stranger), "--limit", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("data.factory=subprocess:getoutput") == 2
    assert "trust=true" in error
    done = run_entry("export.py", f"run={stranger}", cwd=tmp_path)
    assert done.returncode == 2
    assert "data.factory=subprocess:getoutput" in done.stderr
    assert not victim.exists()


def test_what_a_file_says_of_trust_does_not_count(stranger: Path) -> None:
    with pytest.raises(ConfigError, match="names Python code"):
        read(stranger / "config.yaml")
    assert read(stranger / "config.yaml", trust=True).data.factory == "subprocess:getoutput"


def test_trust_does_not_reach_beyond_the_working_folder(stranger: Path, victim: Path, tmp_path: Path) -> None:
    """Even where the user trusts the directory, a setting cannot call what Python or a package brings."""
    done = run_entry("export.py", f"run={stranger}", "trust=true", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for reference in (
        "subprocess:getoutput",
        "builtins:eval",
        "os:system",
        "torch:load",
        "pathlib:Path.unlink",
    ):
        with pytest.raises(ConfigError, match="working directory"):
            load_factory("data.factory", reference)
    assert not victim.exists()


def test_code_of_the_working_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_the_command.py").write_text("def build(names):\n    return len(names)\n")
    for reference in ("beside_the_command:build", "beside_the_command.py:build"):
        assert load_factory("model.factory", reference)(["a", "b"]) == 2
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere.py"
    elsewhere.write_text("raise SystemExit('executed')\n")
    with pytest.raises(ConfigError, match="is not below the working directory"):
        load_factory("model.factory", f"{elsewhere}:build")


CALLS = {
    "callback": "hydra:\n  callbacks:\n    x: {_target_: pathlib.Path.unlink}\n",
    "sweeper": "hydra:\n  sweeper:\n    _target_: pathlib.Path.unlink\n",
    "logging": "hydra:\n  job_logging:\n    handlers: {x: {class: logging.FileHandler, filename: VICTIM}}\n",
    "call in logging": "x: {handlers: {x: {(): pathlib.Path.unlink}}}\n",
    "environment": "hydra:\n  job: {env_set: {LD_PRELOAD: VICTIM}}\n",
    "search path": "hydra:\n  searchpath: [file:///tmp]\n",
    "anchored": "a: &a {_target_: pathlib.Path.unlink}\nhydra: {launcher: *a}\n",
    "escaped": 'data: {"\\x5ftarget_": pathlib.Path.unlink}\n',
    "factory": "model: {name: custom, factory: 'x.py:build'}\n",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_tree_of_settings_names_no_code(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "evil.yaml"
    file.parent.mkdir()
    file.write_text(HEADER + CALLS[kind])
    with pytest.raises(ConfigError, match=r"evil\.yaml.*trust=true"):
        compose(["+experiment=evil"], config_dirs=[tmp_path])


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("hydra/callbacks/x.yaml", "y: 1\n"),
        ("other/x.yaml", "# @package hydra.job_logging\nversion: 1\n"),
        ("experiment/x.yaml", "# @package _global_\ndefaults: [{other@hydra.callbacks: x}]\n"),
    ],
)
def test_a_tree_of_settings_does_not_reach_into_hydra(place: str, text: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(text)
    with pytest.raises(ConfigError, match="Hydra's own settings"):
        compose(["+experiment=demo"], config_dirs=[tmp_path])


def test_plain_settings_and_trusted_code_of_a_tree_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(HEADER + "seed: 7\nhydra: {sweep: {dir: x}, sweeper: {params: {seed: '1,2'}}}\n")
    assert compose(["+experiment=mine"], config_dirs=[tmp_path]).seed == 7
    file.write_text(HEADER + "model: {name: custom, factory: 'x.py:build'}\n")
    assert compose(["+experiment=mine", "trust=true"], config_dirs=[tmp_path]).model.factory == "x.py:build"


def test_hydra_calls_no_function_of_a_file(tmp_path: Path, victim: Path) -> None:
    """End to end: the file is deleted where Octet's check is left out (pathlib.Path.unlink is called)."""
    victim.write_text("here")
    path = f"{{_target_: pathlib.Path, _args_: [{victim}]}}"
    file = tmp_path / "tree" / "experiment" / "evil.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        HEADER + f"hydra:\n  callbacks:\n    x: {{_target_: pathlib.Path.unlink, _args_: [{path}]}}\n"
    )
    for way in (["--config-dir", str(file.parents[1])], [f"hydra.searchpath=[file://{file.parents[1]}]"]):
        done = run_entry("train_qat.py", *way, "+experiment=evil", "stages=[float]", cwd=tmp_path)
        assert done.returncode == 2
        assert "_target_" in done.stderr
    assert victim.exists()


def test_a_pickled_job_is_not_rerun(tmp_path: Path) -> None:
    pickled = tmp_path / "config.pickle"
    pickled.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    done = run_entry("train_qat.py", "--experimental-rerun", str(pickled), "+experiment=demo", cwd=tmp_path)
    assert done.returncode == 2
    assert "not supported" in done.stderr
    assert not (tmp_path / "executed").exists()
