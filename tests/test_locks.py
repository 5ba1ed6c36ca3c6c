"""Locks: one owner, refusal by name, stale locks of this host and of others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import locks
from core.errors import RunError
from core.locks import FileLock
from pipeline.run import directory
from pipeline.run.directory import Run

HOLDER = """
import sys, time
from pathlib import Path
from core.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / directory.LOCK)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_released_lock_leaves_no_file_and_can_be_taken_again(tmp_path):
    lock = FileLock(tmp_path / "x.lock")
    for _ in range(2):
        assert lock.acquire()
        assert lock.owner is None
        written = json.loads((tmp_path / "x.lock").read_text())
        assert written["pid"] == os.getpid()
        assert not FileLock(tmp_path / "x.lock").acquire()
        lock.release()
        assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_by_host_pid_and_start(tmp_path, holder):
    written = json.loads((tmp_path / directory.LOCK).read_text())
    words = rf"in use by process {holder.pid} on {os.uname().nodename}, started {written['started']}: wait for its end"
    with pytest.raises(RunError, match=words):
        Run(tmp_path).lock()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, capfd):
    (tmp_path / ".writing-x").mkdir()
    holder.kill()
    holder.wait()
    run = Run(tmp_path)
    run.lock()
    assert f"the lock of process {holder.pid} on {os.uname().nodename}" in capfd.readouterr().err
    assert not (tmp_path / ".writing-x").exists()
    run.lock()  # the same process may come again
    run.unlock()
    assert list(tmp_path.iterdir()) == []


def of_another_host(path):
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "2026-01-01 00:00:00"}))


def test_the_lock_of_another_host_counts_as_long_as_it_is_touched(tmp_path, monkeypatch):
    """As on a network folder whose system locks do not reach other hosts."""
    path = tmp_path / directory.LOCK
    of_another_host(path)
    touched = []

    def sleep(seconds):
        touched.append(seconds)
        os.utime(path, (len(touched), len(touched)))

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(RunError, match="in use by process 1 on elsewhere, started 2026-01-01"):
        Run(tmp_path).lock()
    assert touched


def test_the_lock_of_another_host_that_nobody_touches_is_stale(tmp_path, monkeypatch):
    of_another_host(tmp_path / "x.lock")
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    lock = FileLock(tmp_path / "x.lock")
    assert not lock.acquire()
    assert lock.is_watched
    now[0] = locks.PATIENCE - 1
    assert not lock.acquire()
    now[0] = locks.PATIENCE + 1
    assert lock.acquire()
    assert lock.owner.host == "elsewhere"
    lock.release()


def test_without_locks_of_the_system_the_process_id_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    path = tmp_path / "x.lock"
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getppid(), "started": "now"}))
    assert not FileLock(path).acquire()
    ended = subprocess.Popen(["true"])
    ended.wait()
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": ended.pid, "started": "now"}))
    lock = FileLock(path)
    assert lock.acquire()
    lock.release()
