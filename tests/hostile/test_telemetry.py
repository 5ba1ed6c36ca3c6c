"""Nothing leaves the machine unasked: OpenVINO's telemetry is not started."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# Every way out of the process is written down: name look-ups and connections.
WATCH = """
import json, socket, sys, threading
asked = []
def note(*arguments, **named):
    asked.append(str(arguments[:2]))
    raise OSError("no network here")
socket.getaddrinfo = note
socket.socket.connect = note
socket.socket.sendto = note
"""
USE = """
from deploy.runtimes.openvino import OpenVINORuntime, _core
OpenVINORuntime.require()
_core()
import openvino
"""
PLAIN = "import openvino\n"
REPORT = """
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(5)
print(json.dumps({"asked": asked, "telemetry": type(sys.modules.get("openvino_telemetry")).__name__}))
"""


def watched(code: str, home: Path) -> dict:
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for name in ("CI", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", WATCH + code + REPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_openvino_does_not_call_home(tmp_path: Path) -> None:
    found = watched(USE, tmp_path)
    assert found == {"asked": [], "telemetry": "NoneType"}
    assert list(tmp_path.rglob("*")) == []


def test_the_watch_would_see_it(tmp_path: Path) -> None:
    """The same watch on a plain import, so that the test above means something."""
    found = watched(PLAIN, tmp_path)
    assert found["telemetry"] == "module"
    assert found["asked"] or list(tmp_path.rglob("*"))
