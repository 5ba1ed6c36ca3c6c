"""Damaged, odd and hostile files by the thousand: every format that Octet reads, mutated, and what becomes of it.

    python benchmarks/fuzz.py [--cases N] [--seed S] [--formats NAME,...]

Each case is a file of `benchmarks.fuzzing.formats`, changed at random (bytes, values), and read by the function that a
run or a command reads it with. It has to be taken or refused in words: an exception that is no `OctetError` is a
defect, so is a case of more than 10 s of processor time or 2 GiB of memory. Cases run in child processes in groups; a
group that ends early is run again case by case. The same seed gives the same cases. One line for each format, then the
defects. The last line of stdout is the number of defects. Exit code 1: there are some.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzzing.formats import FORMATS
from benchmarks.fuzzing.mutations import Format
from core.errors import OctetError

MAX_SECONDS = 10.0  # processor time of a case
MAX_BYTES = 2 * 2**30
GROUP = 25  # cases of one child process
PATIENCE = 120.0  # seconds on the clock after which a group is ended


@dataclass
class Outcome:
    """What became of the cases of one format.

    Attributes:
        counts: `taken`, `refused`, and kinds of defects.
        defects: one line each, with the number of the case.
        slowest: most processor time of a case, seconds.
        peak: most memory of a process, bytes.
    """

    counts: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0


def run_format(form: Format, cases: Sequence[int], seed: int) -> Outcome:
    """Run cases of one format, each given by its number."""
    outcome = Outcome()
    pending = [list(cases[start : start + GROUP]) for start in range(0, len(cases), GROUP)]
    while pending:
        group = pending.pop()
        results, end, peak = _run_group(form, group, seed)
        outcome.peak = max(outcome.peak, peak)
        for number, (kind, seconds, text) in results.items():
            outcome.counts[kind] += 1
            outcome.slowest = max(outcome.slowest, seconds)
            if kind not in ("taken", "refused"):
                outcome.defects.append(f"{form.name} {number}: {kind}: {text}")
            elif seconds > MAX_SECONDS:
                outcome.defects.append(f"{form.name} {number}: {seconds:.1f} s")
        missing = [number for number in group if number not in results]
        if peak > MAX_BYTES and len(group) > 1:
            outcome.peak = 0
            missing = group
            for number, (kind, _, _) in results.items():
                outcome.counts[kind] -= 1
                outcome.defects = [d for d in outcome.defects if not d.startswith(f"{form.name} {number}:")]
        elif peak > MAX_BYTES:
            outcome.defects.append(f"{form.name} {group[0]}: {peak / 2**30:.1f} GiB")
        if missing and len(group) == 1:
            outcome.counts["ended"] += 1
            outcome.defects.append(f"{form.name} {group[0]}: the process ended: {end}")
        else:
            pending += [[number] for number in missing]
    return outcome


def _run_group(form: Format, group: Sequence[int], seed: int) -> tuple[dict[int, Any], str, int]:
    """Run cases in one child process: results by number, how it ended, and its peak of memory."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if not child:
            _run_child(form, group, seed, folder)
        begin = time.monotonic()
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() - begin > PATIENCE * max(1, len(group) / 5):
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(status)
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        file = folder / "results.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        results = {number: result for number, *result in map(json.loads, lines)}
    return results, end, usage.ru_maxrss * 1024


def _run_child(form: Format, group: Sequence[int], seed: int, folder: Path) -> None:
    """Run cases, write a line for each, and leave."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (folder / "results.jsonl").open("w") as stream:
        for number in group:
            used = time.process_time()
            limit = int(used + 2 * MAX_SECONDS) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            result = run_case(form, number, seed, folder / str(number))
            stream.write(json.dumps([number, result[0], time.process_time() - used, result[1]]) + "\n")
            stream.flush()
            shutil.rmtree(folder / str(number), ignore_errors=True)
    os._exit(0)


def run_case(form: Format, number: int, seed: int, folder: Path) -> tuple[str, str]:
    """Make one case in a new folder and read it: `taken`, `refused` or `exception`, and the message."""
    folder.mkdir()
    chance = random.Random(f"{seed} {form.name} {number}")
    before = sorted(path.name for path in folder.parent.iterdir())
    try:
        read = form.make(chance, folder)
        read()
    except OctetError as error:
        kind, text = "refused", str(error)
        if not text or len(text) > 20_000:
            kind = "message of no use"
    except Exception as error:
        kind = "exception"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"
    else:
        kind, text = "taken", ""
    if before != sorted(path.name for path in folder.parent.iterdir()):
        kind, text = "wrote outside its folder", text
    return kind, text[:300]


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Mutate every format that Octet reads.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(form.name for form in FORMATS))
    options = parser.parse_args()
    chosen = [form for form in FORMATS if form.name in options.formats.split(",")]
    shares = sum(form.share for form in chosen)
    defects: list[str] = []
    print("| format | cases | taken | refused | defects | slowest, s of CPU | peak, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for form in chosen:
        found = run_format(form, range(max(1, round(options.cases * form.share / shares))), options.seed)
        total, taken, refused = found.counts.total(), found.counts["taken"], found.counts["refused"]
        figures = f"{found.slowest:.1f} | {found.peak / 2**30:.2f}"
        print(
            f"| {form.name} | {total} | {taken} | {refused} | {len(found.defects)} | {figures} |", flush=True
        )
        defects += found.defects
    for defect in defects:
        print(defect)
    print(len(defects))
    return int(bool(defects))


if __name__ == "__main__":
    sys.exit(main())
