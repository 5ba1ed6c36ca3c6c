"""What README.md and docs/ tell readers to type exists: make targets, entries, and overrides that compose."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs import Config, compose, compose_export
from configs.overrides import check_overrides, groups
from configs.schema import STAGES
from pipeline.commands.octet import help_text
from pipeline.commands.octet import main as octet

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("**/*.md")),
]
FLAGS_WITH_VALUE = {"--cfg"}


def commands(text: str) -> list[str]:
    """Return the lines of all ```bash blocks, without comments."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    lines = [line.split("  #")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


def overrides_of(arguments: list[str]) -> tuple[list[str], bool]:
    """Split off flags; return the overrides and whether it is a sweep."""
    overrides: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument in FLAGS_WITH_VALUE:
            skip = not skip
        elif not argument.startswith("-"):
            overrides.append(argument)
    return overrides, "-m" in arguments


def test_the_two_commands_come_first() -> None:
    first = commands(PAGES[0].read_text(encoding="utf-8"))[:2]
    assert first == ["make demo", "make test"]
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def check_octet(words: list[str]) -> None:
    """A command of `octet`: its settings compose, and its options stand in its help."""
    name, *rest = words
    if name.startswith("-"):
        assert name in help_text()
    elif name == "run" or (name == "doctor" and rest):
        compose(overrides_of(rest)[0])
    elif name == "export":
        compose_export(overrides_of(rest)[0])
    else:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            octet([name, "--help"])
        for option in (word for word in rest if word.startswith("--")):
            assert option in output.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, check=True, capture_output=True)
    elif words[:2] == ["python", "train_qat.py"]:
        assert (REPOSITORY / "train_qat.py").is_file()
        overrides, sweep = overrides_of(words[2:])
        if sweep:  # only the keys: a sweep has no single configuration
            check_overrides(overrides, Config, [REPOSITORY / "configs"], sweeping=True)
        else:
            compose(overrides)
    elif words[0] == "torchrun":
        compose(words[words.index("train_qat.py") + 1 :])
    elif words[:2] == ["python", "export.py"]:
        assert (REPOSITORY / "export.py").is_file()
        compose_export(overrides_of(words[2:])[0])
    elif words[:2] == ["python", "-m"]:
        module = REPOSITORY / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    elif words[0].startswith(("scripts/", ".ci/", "benchmarks/")):
        assert (REPOSITORY / words[0]).is_file()
    elif words[:2] == ["python", "-c"]:
        subprocess.run([sys.executable, "-c", words[2]], check=True, capture_output=True)
    elif words[0] == "octet":
        check_octet(words[1:])
    elif words[0] == "torchrun":
        test_command_exists(shlex.join(["python", *words[words.index("train_qat.py") :]]))
    elif words[0] == "python":
        assert (REPOSITORY / words[1]).is_file()
    else:
        assert words[0] in ("git", "cd", "docker", "pip", "source"), (
            f"README tells readers to run {words[0]}: what is it?"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_in_zsh_and_needs_no_file_of_ours(command: str) -> None:
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    assert not set("[]{}*?~<>()") & set(unquoted), "zsh expands these, or fails: quote them"
    assert "shared" not in command
    for word in shlex.split(command):
        value = word.rpartition("=")[2]
        assert not value.startswith(("/", "..")) or value == "/path/to/python3.11", (
            f"{word} is a path of this machine"
        )


def test_every_module_that_is_run_exists() -> None:
    named = set()
    for page in [*PAGES, REPOSITORY / "CHANGELOG.md"]:
        named |= set(re.findall(r"python -m ([\w.]+\w)", page.read_text(encoding="utf-8")))
    assert {"deploy.check", "models.checkpoints", "pipeline.predict"} <= named
    for name in named:
        path = REPOSITORY / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_the_example_of_the_report_page_runs(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/report.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "engine:openvino:int8" in done.stdout
    assert (tmp_path / "runs/mine/report.html").is_file()


def test_figures_of_the_readme_are_measured_ones() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    results = (REPOSITORY / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    tables = "".join(line for line in text.splitlines(keepends=True) if line.startswith("| "))
    figures = set(re.findall(r"[-+]?\d+\.\d{4}(?: ± \d+\.\d{4})?|\d+\.\d(?= ms|,| \|)", tables))
    assert {"-0.0004 ± 0.0008", "160.8", "0.6102"} <= figures
    assert not {figure for figure in figures if figure not in results}


def test_the_placement_of_the_example_is_the_one_shown(tmp_path: Path) -> None:
    from examples.placement import draw_example

    placement = draw_example(tmp_path)
    page = (REPOSITORY / "docs/placement.md").read_text(encoding="utf-8")
    assert placement.describe() in page
    drawn = (tmp_path / "placement.svg").read_text(encoding="utf-8")
    assert drawn == (REPOSITORY / "docs/images/placement.svg").read_text(encoding="utf-8")
    assert {group.name for group in placement.groups} == {
        "input.images",
        "stem.act",
        "branch1.act",
        "merge.act",
    }


def test_the_prose_check_finds_what_it_is_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    code = tmp_path / "code.py"
    page.write_text("It fails without\na word, at the end of the day.\n`held against`\n", encoding="utf-8")
    code.write_text('x = "held_against"  # held against\n"""Text held\nagainst it."""\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "scripts/prose.py", str(page), str(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    lines = [line.rpartition("/")[2] for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert lines[0] == "page.md:1: 'without a word': silently, or: without a message"
    assert "page.md:2: cliches" in done.stdout  # proselint's
    assert [line.split(": ")[0] for line in lines[-3:-1]] == ["code.py:1", "code.py:2"]


def test_every_experiment_and_stage_is_described() -> None:
    text = (REPOSITORY / "docs/job.md").read_text(encoding="utf-8")
    for name in groups([REPOSITORY / "configs"])["experiment"]:
        assert f"`{name}`" in text
    assert re.findall(r"^\| `(\w+)` \|", text[text.index("## Stages") :], flags=re.MULTILINE)[
        : len(STAGES)
    ] == list(STAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
