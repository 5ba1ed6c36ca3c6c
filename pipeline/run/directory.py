"""The run directory: named artifacts, written whole or not at all, and what has been done so far.

runs/<experiment>/<time>/
    config.json          the configuration, as composed
    state.json           stages done, with seconds
    float.safetensors    the float detector, folded (+ .json manifest); a custom network's weights as they are
    placement.yaml, calibration.json, ptq.safetensors
    qat.safetensors, qat.jsonl, qat.json, qat-state.pt
    model.onnx, float.onnx, engines/
    rows/<name>.json     one table row each
    report.html, report.md, report.json
runs/<experiment>/latest -> <time>
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import RunError
from core.files import write_text
from report import ROW_KEYS

CONFIG = "config.yaml"
_FIGURES = ROW_KEYS[1:]  # all but the name


class Run:
    """One run directory.

    Args:
        directory: an existing run directory, or one to make with `Run.create`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def create(cls, directory: Path | None, experiment: str, root: Path = Path("runs")) -> Run:
        """Make a run directory: the given one, or `root/<experiment>/<time>` with a `latest` link beside it.

        Raises:
            RunError: the given directory holds files already.
        """
        if directory is not None:
            if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise RunError(
                    f"run_dir={directory} exists and is not empty: add resume=true to go on in it, or choose another"
                )
            directory.mkdir(parents=True, exist_ok=True)
            return cls(directory)
        parent = root / experiment
        parent.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        fresh_name = stamp
        attempt = 0
        while True:
            try:
                (parent / fresh_name).mkdir()
                break
            except FileExistsError:
                attempt += 1
                fresh_name = f"{stamp}_{attempt}"
        link = parent / "latest"
        fresh = parent / f".latest-{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(fresh_name)
        fresh.replace(link)
        return cls(parent / fresh_name)

    @classmethod
    def open(cls, directory: Path) -> Run:
        """Open a run directory that exists.

        Raises:
            RunError: it is no run directory.
        """
        if not (directory / CONFIG).is_file():
            raise RunError(
                f"{directory} is no run directory: expected config.yaml in it, as train_qat.py leaves it"
            )
        return cls(directory.resolve())

    def path(self, name: str) -> Path:
        """Where an artifact lies (it need not exist yet)."""
        return self.directory / name

    def need(self, name: str, stage: str) -> Path:
        """Path of an artifact that must exist.

        Raises:
            RunError: it does not; the message names the stage that makes it.
        """
        path = self.path(name)
        if not path.exists():
            raise RunError(f"{path} is missing: the stage `{stage}` makes it; add it to stages")
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write an artifact whole or not at all."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        return path

    def write_json(self, name: str, content: Any) -> Path:
        """Write plain data as JSON."""
        return self.write_text(name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Read plain data back."""
        return json.loads(self.path(name).read_text())

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> Path:
        """Write records as JSON lines."""
        return self.write_text(name, "".join(json.dumps(record) + "\n" for record in records))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read JSON lines; an artifact that is not there gives none."""
        path = self.path(name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    # -- what has been done

    def stages(self) -> list[dict[str, Any]]:
        """Stages done so far: name and seconds, in order."""
        return list(self.read_json("state.json")) if self.path("state.json").exists() else []

    def is_done(self, stage: str) -> bool:
        """Whether the stage has finished in this directory."""
        return any(entry["name"] == stage for entry in self.stages())

    def mark_done(self, stage: str, seconds: float) -> None:
        """Remember that the stage has finished."""
        entries = [entry for entry in self.stages() if entry["name"] != stage]
        self.write_json("state.json", [*entries, {"name": stage, "seconds": round(seconds, 3)}])

    # -- table rows

    def write_row(self, name: str, **figures: Any) -> None:
        """Write one row of the result table; figures that are missing stay null."""
        extras = {key: value for key, value in figures.items() if key not in _FIGURES}
        row = {"name": name, **{key: figures.get(key) for key in _FIGURES}, "extras": extras}
        self.write_json(f"rows/{name.replace(':', '-')}.json", row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows: float, ptq, qat, then engines, INT8 first."""
        rows = [json.loads(path.read_text()) for path in sorted(self.path("rows").glob("*.json"))]
        first = ("float", "ptq", "qat")
        return sorted(
            rows,
            key=lambda row: (
                first.index(row["name"]) if row["name"] in first else 3,
                not row["name"].endswith("int8"),
                row["name"],
            ),
        )
