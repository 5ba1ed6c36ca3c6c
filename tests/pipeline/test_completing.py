"""What a shell completes: in a real bash on a terminal, and word by word."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from configs.compose import CONFIG_DIR, compose
from configs.overrides import check_overrides
from configs.schema import Config
from core.choices import OBSERVERS
from pipeline.commands.completing import SCRIPTS, candidates, for_shell
from pipeline.commands.table import SUBCOMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_line_without_a_command_gets_the_commands() -> None:
    assert set(SUBCOMMANDS) < set(candidates("octet "))
    assert candidates("octet be") == ["benchmark"]
    assert candidates("octet --completion b") == ["bash"]
    assert candidates("octet nothing ") == []


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_options(name: str) -> None:
    found = candidates(f"octet {name} --")
    assert "--help" in found
    assert all(option.startswith("--") for option in found)


def test_every_setting_is_reached_from_its_section_and_is_one() -> None:
    """From an empty word, section by section: as many settings as the schema has, and each is accepted as a key."""
    sections, settings = [""], set()
    while sections:
        for word in candidates(f"octet run {sections.pop()}"):
            (settings.add if word.endswith("=") else sections.append)(word)
    assert {"+experiment=", "weights=", "data.root=", "quant.activations.unsigned="} <= settings
    keys = [word.removesuffix("=") for word in settings if "." in word]
    check_overrides([f"{key}=null" for key in keys], Config, [CONFIG_DIR])
    documented = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    named = documented.partition("## Settings of export.py")[0]
    assert all(f"`{key.lstrip(chr(43))}`" in named for key in keys)


def test_values_are_those_that_compose() -> None:
    assert candidates("octet run quant.observer=") == [f"quant.observer={name}" for name in OBSERVERS]
    assert candidates("octet run quant.activations.unsigned=t") == ["quant.activations.unsigned=true"]
    assert candidates("octet run stages=[float,cal") == ["stages=[float,calibrate"]
    assert "target=trt10" in candidates("octet export target=trt")
    for word in candidates("octet doctor +experiment=d"):
        assert compose([word, "weights=w.pt", "data.root=d"]).experiment == word.partition("=")[2]


def test_files_are_offered_where_a_path_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets/bccd").mkdir(parents=True)
    (tmp_path / "sets/.hidden").mkdir()
    (tmp_path / "set.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates("octet run weights=se") == ["weights=set.pt", "weights=sets/"]
    assert candidates("octet run data.root=sets/") == ["data.root=sets/bccd/"]
    assert for_shell("bash", "octet run data.root=sets/b") == ["sets/bccd/"]
    assert for_shell("zsh", "octet run data.root=sets/b") == ["data.root=sets/bccd/"]
    assert candidates("octet predict se") == []  # the shell's own files


def test_completing_takes_little_time_and_no_torch() -> None:
    line = "octet run quant.observer=m"
    code = (
        "import os, sys, time\nfrom pipeline.commands.octet import main\nmain(['--complete', 'bash'])\n"
        "print('torch' in sys.modules, time.process_time(), file=sys.stderr)"
    )
    environment = {**os.environ, "COMP_LINE": line, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["minmax", "mse"]
    imported, seconds = done.stderr.split()
    assert imported == "False"
    assert float(seconds) < 1.0  # 0.27 measured


def press_tab(shell: list[str], typed: dict[str, str], folder: Path) -> str:
    """Type into an interactive shell, `\\t` for the tab key, and await the given text; returns all that was shown."""
    programs = folder / "bin"
    programs.mkdir()
    octet = programs / "octet"
    octet.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline.commands "$@"\n')
    octet.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "TERM": "dumb",
    }  # fmt: skip
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.execvpe(shell[0], shell, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))  # no line is wrapped
    shown = ""
    for text, awaited in typed.items():
        os.write(terminal, text.encode())
        shown += read_until(terminal, awaited)
    os.kill(process, signal.SIGKILL)
    os.close(terminal)
    os.waitpid(process, 0)
    return shown


def read_until(terminal: int, awaited: str, limit: float = 30.0) -> str:
    """What a terminal shows, up to the text, or in `limit` seconds."""
    shown, end = "", time.monotonic() + limit
    while awaited not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


@pytest.mark.parametrize(
    ("shell", "options"),
    [
        pytest.param(name, options, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name}"))
        for name, options in (("bash", ["--norc", "--noprofile", "-i"]), ("zsh", ["-f", "-i"]))
    ],
)
def test_the_tab_key_completes(shell: str, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    shown = press_tab(
        [shell, *options],
        {
            f"eval \"$(octet --completion {shell})\"; echo rea''dy\n": "ready",
            "octet ru\t": "run",
            " data.image_s\t": "image_size=",
            "320 weights=be\t": "best.pt",
            " quant.share_concat_scales=me\t": "=measured",
        },
        tmp_path,
    )
    assert "octet run data.image_size=320 weights=best.pt quant.share_concat_scales=measured" in " ".join(
        shown.split()
    )


def test_every_script_calls_octet() -> None:
    assert all("octet --complete " in script for script in SCRIPTS.values())
