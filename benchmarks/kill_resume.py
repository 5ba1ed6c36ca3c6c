"""SIGKILL at random times: is a killed and resumed run the same as an undisturbed one?

    python benchmarks/kill_resume.py --kills 100 [--seconds 360] [--folder FOLDER] [--seed 0]

A tiny job (float training, evaluation, calibration, sensitivity, fine-tuning; YOLOv9-t at 64 pixels) runs once without
disturbance. Then it runs again and again, and each process is killed after a random amount of CPU time and resumed,
until the job is done; then all artifacts are compared with those of the undisturbed run. Processes are forked from one
that has imported everything, so that kills hit the work and not the imports. Exit code 1 if a run ends with an error,
or an artifact differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from configs import compose
from pipeline.main import run_job
from pipeline.run.ledger import STATE

SETTINGS = (
    "+experiment=demo", "data.image_size=64", "data.synthetic.size=64", "data.synthetic.train=16",
    "data.synthetic.val=4", "data.workers=0", "train.epochs=2", "train.batch_size=4", "qat.epochs=2",
    "qat.batch_size=4", "qat.select=last", "qat.oscillation=freeze", "quant.calibration_images=4",
    "sensitivity.method=sqnr", "sensitivity.images=2", "threads=1", "checkpoint_minutes=0.01",
    "stages=[train,float,calibrate,sensitivity,finetune]",
)  # fmt: skip
NOT_COMPARED = {"config.yaml", STATE}
LONGEST = 12.0  # CPU seconds until a kill; fine-tuning needs a few before its first saved state


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=100, help="stop after the run that reaches so many kills"
    )
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="CPU seconds after which no new run begins"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_resume"), help="working folder")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    os.chdir(options.folder)
    code, seconds = attempt("undisturbed", None)
    assert code == 0, f"the undisturbed run ended with exit code {code}: see undisturbed.log"
    print(f"undisturbed run: {seconds:.1f} CPU seconds", flush=True)
    expected = fingerprints(Path("undisturbed"))
    chance, spent = random.Random(options.seed), seconds
    killed: Counter[str] = Counter()
    for number in range(1_000_000):
        if killed.total() >= options.kills or spent >= options.seconds:
            break
        code, before = None, killed.total()
        while code is None:
            code, seconds = attempt(f"run{number}", chance.uniform(0.0, LONGEST))
            spent += seconds
            if code is None:
                killed[stage_of(Path(f"run{number}"))] += 1
        different = differences(expected, fingerprints(Path(f"run{number}")))
        print(
            f"run {number}: {killed.total() - before} kills, exit code {code}, "
            + (f"different: {', '.join(different)}" if different else f"all {len(expected)} artifacts equal"),
            flush=True,
        )
        if code != 0 or different:
            return 1
        shutil.rmtree(f"run{number}")
    places = ", ".join(f"{stage} {count}" for stage, count in killed.most_common())
    print(f"{killed.total()} kills ({places}); all artifacts equal to the undisturbed run's")
    return 0


def attempt(
    name: str, limit: float | None, before_kill: Callable[[], None] = lambda: None
) -> tuple[int | None, float]:
    """Run or resume the job in a separate process; its exit code (None: killed) and CPU seconds."""
    resume = (Path(name) / "config.yaml").exists()
    if not resume:
        shutil.rmtree(name, ignore_errors=True)  # killed before the first file
    settings = [*SETTINGS, f"run_dir={name}", f"resume={str(resume).lower()}"]
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{Path(name).name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            run_job(compose(settings))
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    used = 0.0
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return (None if code == -signal.SIGKILL else code), usage.ru_utime + usage.ru_stime
        used = cpu_seconds(pid)
        if limit is not None and used >= limit:
            before_kill()
            os.kill(pid, signal.SIGKILL)
            limit = None
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stage_of(run: Path) -> str:
    """The stage that was running."""
    try:
        stages = json.loads((run / STATE).read_text())["stages"]
    except OSError:
        return "start"
    return next((name for name, entry in stages.items() if entry["status"] != "done"), "between stages")


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of the artifacts that are missing, added or changed."""
    return sorted(name for name in {*expected, *found} if found.get(name) != expected.get(name))


def fingerprints(run: Path) -> dict[str, str]:
    """Hashes of a run's artifacts by name; of logs without the times."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        content = path.read_bytes()
        if name in NOT_COMPARED:
            continue
        if path.suffix == ".jsonl":
            records = [{**json.loads(line), "seconds": 0} for line in content.splitlines()]
            content = json.dumps(records).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
