"""`octet doctor [KEY=VALUE ...]`: what a run would trip over, found before hours are spent.

Without settings it looks at the machine: versions, processor, memory, GPU, runtimes, disk. With the settings of a run,
as `octet run` takes them, it also checks what the run checks at its start (configuration, weights, data, stages,
runtimes), with the same functions, and makes no run directory.

Exit code 0: nothing is in the way, though there may be warnings. 2: wrong arguments or configuration. 3: something of
the machine, the weights or the data is in the way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.choices import NATIVE
from core.command import command_parser, reports_errors
from core.errors import EXIT_INPUT, EXIT_OK, ConfigError, DeployError, OctetError
from core.files import check_writable, write_json
from core.machine import describe_machine, describe_versions
from core.registry import resolve
from core.runtimes import RUNTIMES

if TYPE_CHECKING:
    from configs.schema import Config

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
EXAMPLES = (
    "%(prog)s",
    "%(prog)s +experiment=bccd weights=best.pt data.root=datasets/bccd",
    "%(prog)s --json doctor.json",
)
GIB = 2**30
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 2.0, 4.0, 1.0  # GiB below which a run often fails
FAST_INT8 = (
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
)  # instructions that INT8 engines of CPUs are fast with


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        status: ok, note, warning or problem.
        subject: what was looked at.
        text: what was found, and the remedy where one is needed.
    """

    status: str
    subject: str
    text: str


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "octet doctor") -> int:
    """Run the command; returns the exit code."""
    parser = command_parser(
        program, "Check the machine and, with settings, the weights and data of a run.", EXAMPLES
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings of the run, as for `octet run`"
    )
    parser.add_argument("--runs", default="runs", help="folder that runs are written to")
    parser.add_argument("--json", help="write the findings to this file")
    options = parser.parse_args(arguments)
    config = None
    if options.settings:
        from configs.compose import compose

        config = compose(options.settings)
    findings = []
    wanted = () if config is None or "engine" not in config.stages else tuple(config.deploy.runtimes)
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_versions,
        check_machine,
        check_gpu,
        check_kernel,
        lambda: check_runtimes(wanted),
        lambda: check_disk(Path(options.runs)),
    ]
    if config is not None:
        checks.append(lambda: check_run(config))
    for check in checks:
        for finding in check():
            print(f"{finding.status:>8}  {finding.subject}: {finding.text}", flush=True)
            findings.append(finding)
    if options.json is not None:
        write_json(Path(options.json), [asdict(finding) for finding in findings])
    problems, warnings = (sum(f.status == status for f in findings) for status in (PROBLEM, WARNING))
    print(f"{problems} problems, {warnings} warnings")
    return EXIT_INPUT if problems else EXIT_OK


def check_versions() -> Iterator[Finding]:
    """Python and the libraries that are installed."""
    versions = describe_versions()
    yield Finding(OK, "versions", ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_machine() -> Iterator[Finding]:
    """Processor, its instructions for INT8, memory, and the shared memory that data workers use."""
    machine = describe_machine()
    instructions = [str(name) for name in machine["instructions"]]  # type: ignore[attr-defined]
    yield Finding(OK, "processor", f"{machine['processor']}, {machine['processors']} for this process")
    if set(FAST_INT8) & set(instructions):
        yield Finding(OK, "INT8 on the CPU", ", ".join(instructions))
    else:
        listed = ", ".join(instructions) or "none of the instructions that are known"
        yield Finding(
            WARNING,
            "INT8 on the CPU",
            f"{listed}: without VNNI, INT8 engines on this CPU are hardly faster than float; measure latency first",
        )
    memory = available_memory()
    if memory is not None:
        status = OK if memory >= LEAST_MEMORY else WARNING
        remedy = "" if status == OK else ": use smaller batches (qat.batch_size, data.workers)"
        yield Finding(status, "memory", f"{memory:.1f} GiB free of {machine.get('memory_gib', '?')}{remedy}")
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / GIB) < LEAST_SHARED:
        yield Finding(
            NOTE,
            "shared memory",
            f"{size:.2f} GiB: in a container add --ipc=host, so that data workers share batches",
        )


def available_memory() -> float | None:
    """GiB that this machine, or the container that the process is in, can still give; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdecimal():
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found) / GIB if found else None


def check_gpu() -> Iterator[Finding]:
    """What torch sees, and what the system has."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            PROBLEM, "torch", f"cannot be imported ({error}): install the packages of pyproject.toml again"
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            text = f"{device.name}, {device.total_memory / GIB:.1f} GiB, {capability}"
            yield Finding(OK, f"GPU {index}", text)
        return
    if Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi"):
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
        yield Finding(
            WARNING,
            "GPU",
            f"an NVIDIA driver is installed, but torch finds no GPU ({reason}): install a torch build for this driver",
        )
        return
    yield Finding(NOTE, "GPU", "none: training runs on the CPU, TensorRT engines cannot be run here")


def check_kernel() -> Iterator[Finding]:
    """Which form of fake quantization a CPU gets; builds the native one if it is not kept."""
    try:
        from quant.native.building import cache_folder
        from quant.native.kernel import describe_kernel
    except (ImportError, OSError):
        return  # torch; see above
    text = describe_kernel()
    if text.startswith(NATIVE):
        yield Finding(OK, "fake quantization", f"{text}, kept in {cache_folder()}")
    else:
        yield Finding(NOTE, "fake quantization", text)


def check_runtimes(wanted: Sequence[str]) -> Iterator[Finding]:
    """Which runtimes can build and run engines here; those that a run wants have to.

    Args:
        wanted: names in `core.runtimes.RUNTIMES`.
    """
    for entry in RUNTIMES.values():
        found = resolve(entry.factory)
        try:
            found.require()
        except DeployError as error:
            yield Finding(PROBLEM if entry.name in wanted else NOTE, entry.title, str(error))
            continue
        if found.can_run():
            yield Finding(OK, entry.title, "engines are built and run here")
        else:
            yield Finding(NOTE, entry.title, "engines are built here; running them needs a GPU")


def check_disk(runs: Path) -> Iterator[Finding]:
    """Whether runs can be written, and what is free there."""
    try:
        check_writable(runs)
    except OctetError as error:
        yield Finding(PROBLEM, "disk", str(error))
        return
    existing = next(folder for folder in (runs, *runs.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    if free < LEAST_DISK:
        yield Finding(
            PROBLEM,
            "disk",
            f"{free:.1f} GiB free for {runs}, a run needs {LEAST_DISK:g}: free some, or use run_dir=",
        )
    else:
        yield Finding(OK, "disk", f"{free:.0f} GiB free for {runs}, {os.cpu_count()} processors")


def check_run(config: Config) -> Iterator[Finding]:
    """Everything that a run checks at its start: weights, data, stages, runtimes."""
    from pipeline.main import plan_job

    try:
        job = plan_job(config)
    except ConfigError:
        raise
    except OctetError as error:
        yield Finding(PROBLEM, "run", str(error))
        return
    yield Finding(
        OK, "configuration", f"stages {', '.join(config.stages)}; it would write {job.run.directory}"
    )
    if config.weights is not None:
        yield Finding(OK, "weights", config.weights)
    opened = vars(job.splits)
    for name, split in (("training", opened.get("train")), ("validation", opened.get("val"))):
        if split is not None:
            yield Finding(OK, f"{name} data", f"{len(split)} images, {len(split.names)} classes")
            yield from (Finding(NOTE, f"{name} data", note) for note in getattr(split, "notes", ()))
