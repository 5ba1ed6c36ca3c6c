"""What `--help` of the entries prints.

Hydra's own help composes the configuration once for each group that it lists, which takes longer than all the rest of
the start (benchmarks/startup.py); the groups are files, so they are read from their folders.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from configs.overrides import groups

WIDTH = 100
JOB = """\
Quantizes a trained object detector and measures accuracy and speed at every step.

usage:
  {program} +experiment=NAME [weights=FILE] [data.root=FOLDER] [KEY=VALUE ...]

examples:
  {program} +experiment=demo
  {program} +experiment=detector weights=best.pt data.root=datasets/mine data.image_size=640
  {program} +experiment=bccd weights=w.pt data.root=datasets/bccd 'stages=[float,calibrate,report]'
  {program} run_dir=runs/bccd/latest resume=true +experiment=bccd weights=w.pt data.root=datasets/bccd
  {program} -m +experiment=bccd weights=w.pt data.root=datasets/bccd seed=0,1,2

groups (choose with GROUP=OPTION):
{groups}

options:
  -m, --multirun        a sweep: run every combination of values separated by commas
  --cfg job             print the composed configuration and leave
  --config-dir FOLDER   a tree of your own, with FOLDER/experiment/mine.yaml
  --shell-completion    see docs/cli.md

Every key is described in docs/configuration.md.
"""
EXPORT = """\
Writes the ONNX of a finished run for one target.

usage:
  {program} run=DIRECTORY target=NAME [KEY=VALUE ...]

examples:
  {program} run=runs/bccd/latest target=trt10
  {program} run=runs/bccd/latest target=openvino batch=8 dynamic_batch=false build=true

options:
  --cfg job             print the composed configuration and leave

Every key is described in docs/configuration.md.
"""
TEXTS = {"config": JOB, "export": EXPORT}


def help_text(config_name: str, program: str, config_dirs: Sequence[Path]) -> str:
    """The help of an entry.

    Args:
        config_name: "config" or "export".
        program: how the command was called: `train_qat.py`, or `octet run`.
        config_dirs: roots whose folders are the groups.
    """
    called = f"python {program}" if program.endswith(".py") else program
    return TEXTS[config_name].format(
        program=called, groups="\n".join(map(_line, groups(config_dirs).items()))
    )


def _line(group: tuple[str, list[str]]) -> str:
    name, options = group
    label = f"  {'+' if name == 'experiment' else ''}{name}: "
    return textwrap.fill(label + ", ".join(options), WIDTH, subsequent_indent="      ")
