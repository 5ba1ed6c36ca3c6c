"""Write docs/configuration.md from the schema: `python -m configs.describe > docs/configuration.md`.

A test compares the page with what this prints, so the page is always up to date.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from configs.deploy_schema import ExportConfig
from configs.overrides import groups
from configs.quant_schema import PolicyRule
from configs.schema import Config

INTRODUCTION = """\
# Configuration

This page is written by `python -m configs.describe`; a test compares it with `configs/schema.py`.

A configuration is composed from YAML files and the command line by [Hydra](https://hydra.cc), and its
names, types and limits are checked before anything is loaded. Later values override earlier ones: schema defaults,
group options, experiment, command line.

```bash
python train_qat.py +experiment=demo qat.epochs=3 quant=w4a8 'stages=[train,float,calibrate,finetune,report]'
python train_qat.py -m +experiment=demo seed=0,1,2
```

- `+experiment=NAME` adds an experiment; the plus sign is needed because no experiment is in the defaults.
- `GROUP=OPTION` chooses a file of a group, `KEY=VALUE` sets one value, `KEY=null` resets a value to none.
- Quote lists and mappings for the shell: `'stages=[float,calibrate]'`,
  `'quant.policy=[{match: head.*, keep_float: true}]'`. New keys of a free mapping need a plus sign:
  `'+data.merge_classes={vehicle: [car, bus]}'`.
- `-m` runs every combination of values separated by commas, each in its own directory below
  `runs/<experiment>/multirun/<time>`. A job that fails does not stop the others; the sweep then ends with the
  highest of their exit codes.
- `--config-dir FOLDER` adds your own configuration files: `FOLDER/experiment/mine.yaml`, with `# @package _global_`
  in the first line.
- `--cfg job` prints the composed configuration, `HYDRA_FULL_ERROR=1` in the environment adds tracebacks.
"""


def page() -> str:
    """Return the whole of docs/configuration.md."""
    parts = [INTRODUCTION, "## Groups\n", _group_table()]
    parts += ["## Settings of train_qat.py\n", *_sections(Config, "")]
    parts += [
        "### quant.policy[...]\n",
        _first_paragraph(PolicyRule) + "\n",
        _table(PolicyRule, ""),
    ]
    parts += ["## Settings of export.py\n", *_sections(ExportConfig, "")[2:]]
    return "\n".join(parts)


def _group_table() -> str:
    lines = ["| group | options |", "| --- | --- |"]
    for name, options in groups([Path(__file__).resolve().parent]).items():
        lines.append(
            f"| `{'+' if name == 'experiment' else ''}{name}` | {', '.join(f'`{option}`' for option in options)} |"
        )
    return "\n".join(lines) + "\n"


def _sections(schema: type, prefix: str) -> list[str]:
    """Return the table of a dataclass, then one section per nested dataclass, depth first."""
    parts = [
        f"### {prefix.rstrip('.') or 'Top level'}\n",
        _first_paragraph(schema) + "\n",
        _table(schema, prefix),
    ]
    for name, inner in _nested(schema).items():
        parts += _sections(inner, f"{prefix}{name}.")
    return parts


def _nested(schema: type) -> dict[str, type]:
    hints = get_type_hints(schema)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(schema)
        if isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name])
    }


def _first_paragraph(schema: type) -> str:
    return " ".join((schema.__doc__ or "").split("\n\n")[0].split())


def _table(schema: type, prefix: str) -> str:
    nested = _nested(schema)
    lines = ["| key | type | default | limits | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(schema):
        if field.name not in nested:
            meaning = str(field.metadata["description"])
            unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
            kind = "int or list" if field.metadata["is_size"] else str(field.type).replace(" | None", "")
            cells = [
                f"`{prefix}{field.name}`",
                kind,
                _default(field),
                _limits(field.metadata),
                meaning + unit,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value == MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value)


def _limits(metadata: Any) -> str:
    parts = [", ".join(metadata["choices"])] if metadata["choices"] else []
    if metadata["above"] is not None:
        parts.append(f"> {metadata['above']}")
    if metadata["minimum"] is not None:
        parts.append(f"≥ {metadata['minimum']}")
    if metadata["maximum"] is not None:
        parts.append(f"≤ {metadata['maximum']}")
    if metadata["multiple"] is not None:
        parts.append(f"multiple of {metadata['multiple']}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
