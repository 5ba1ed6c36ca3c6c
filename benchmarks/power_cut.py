"""Power cuts at random times: is what a run calls done on disk, and does it continue as if nothing had happened?

    python benchmarks/power_cut.py --cuts 20 [--folder FOLDER] [--seed 0]

The job of `kill_resume.py` works in an ext4 file system of its own (an image on a loop device, default options; needs
root). After a random amount of CPU time the file system is shut down without writing its journal
(`EXT4_IOC_SHUTDOWN`), so that everything that was not flushed is lost; the process is killed, the file system mounted
again, and the job resumed until it is done. After every cut the artifacts of every stage that `state.json` calls done
are compared with their recorded hashes; in the end all artifacts with those of an undisturbed run. Exit code 1 if one
differs, or a run ends with an error. Skipped where the file system cannot be made.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.kill_resume import LONGEST, attempt, differences, fingerprints, stage_of
from pipeline.run.ledger import Ledger, hash_files

IMAGE_BYTES = 512 * 2**20
SHUTDOWN, NO_JOURNAL = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN and its flag, include/uapi/linux/ext4.h


class Disk:
    """An ext4 file system in a file.

    Args:
        folder: where the file and the mount point are made.

    Attributes:
        is_cut: whether it was shut down since it was mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.mount = folder / "disk.img", folder / "disk"
        self.mount.mkdir()
        with self.image.open("wb") as stream:
            stream.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self.attach()

    def attach(self) -> None:
        """Mount it; the journal is replayed."""
        subprocess.run(["mount", "-o", "loop", self.image, self.mount], check=True)
        self.is_cut = False

    def detach(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", self.mount], check=True)

    def cut(self) -> None:
        """Let everything be lost that is not on the device."""
        handle = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NO_JOURNAL))
        finally:
            os.close(handle)
        self.is_cut = True


def missing(run: Path) -> list[str]:
    """Artifacts of finished stages that are not what `state.json` says."""
    found = []
    for stage, record in Ledger(run).records().items():
        if record.is_done:
            now = hash_files(run, record.outputs)
            found += [f"{stage}: {name}" for name, value in record.outputs.items() if now.get(name) != value]
    return found


def run_with_cuts(
    disk: Disk, name: str, chance: random.Random, places: Counter[str]
) -> tuple[int, list[str]]:
    """Cut the power again and again until the job ends by itself; its exit code, and what was lost."""
    run, lost = disk.mount / name, list[str]()
    while True:
        code, _ = attempt(str(run), chance.uniform(0.0, LONGEST), disk.cut)
        if not disk.is_cut:
            return code or 0, lost
        disk.detach()
        disk.attach()
        places[stage_of(run)] += 1
        lost += missing(run)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=20, help="stop after the run that reaches so many cuts")
    parser.add_argument("--folder", type=Path, default=Path("runs/power_cut"), help="working folder")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the cuts")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    os.chdir(options.folder)
    try:
        disk = Disk(Path.cwd())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped: no ext4 file system can be made here ({error}): run it as root", file=sys.stderr)
        return 0
    code, _ = attempt("undisturbed", None)
    assert code == 0, "the undisturbed run failed: see undisturbed.log"
    expected, chance = fingerprints(Path("undisturbed")), random.Random(options.seed)
    places: Counter[str] = Counter()
    number = 0
    try:
        while places.total() < options.cuts:
            before = places.total()
            code, lost = run_with_cuts(disk, f"run{number}", chance, places)
            different = differences(expected, fingerprints(disk.mount / f"run{number}"))
            print(
                f"run {number}: {places.total() - before} cuts, exit code {code}, lost: {lost or 'nothing'}, "
                + (f"different: {different}" if different else f"all {len(expected)} artifacts equal"),
                flush=True,
            )
            if code or lost or different:
                return 1
            shutil.rmtree(disk.mount / f"run{number}")
            number += 1
    finally:
        disk.detach()
    shown = ", ".join(f"{stage} {count}" for stage, count in places.most_common())
    print(f"{places.total()} power cuts ({shown}); nothing lost that was done, all artifacts equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
