"""What a shell completes in a line that begins with `octet`: commands, options, settings and their values.

A shell calls `octet --complete SHELL` whenever the tab key is pressed, so torch is not imported here.
Where there is no candidate, the shell offers the names of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

from core.registry import resolve
from pipeline.commands.table import SUBCOMMANDS

SCRIPTS = {
    "bash": """\
_octet() {
    mapfile -t COMPREPLY < <(COMP_LINE="${COMP_LINE:0:COMP_POINT}" octet --complete bash 2>/dev/null)
    if [[ "${COMPREPLY[0]}" == *[=./] || "${COMPREPLY[0]}" == *\\[* ]]; then compopt -o nospace; fi
}
complete -o default -F _octet octet""",
    "zsh": """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
complete -o default -o nospace -C 'octet --complete zsh' octet""",
    "fish": """\
complete -c octet -a '(env COMP_LINE=(commandline -cp | string collect) octet --complete fish)'""",
}
OPTIONS = ("--completion", "--help", "--version")
SETTINGS = {"run": "config", "doctor": "config", "export": "export"}  # command -> its schema in `SCHEMAS`

PATHS = (
    "weights",
    "root",
    "run_dir",
    "run",
    "output",
    "placement",
    "directory",
    "cache_dir",
    "gpu_file",
    "factory",
)


def candidates(line: str) -> list[str]:
    """What the last word of a line can become, in full; empty where the shell should offer files.

    Args:
        line: what is typed up to the cursor, beginning with `octet`.
    """
    words = line.split()
    last = words.pop() if words and not line[-1].isspace() else ""
    if len(words) < 2:
        return _starting(last, [*SUBCOMMANDS, *OPTIONS])
    name = words[1]
    if name not in SUBCOMMANDS:
        return _starting(last, SCRIPTS) if name == "--completion" else []
    if last.startswith("-"):
        return _starting(last, options_of(name))
    if name not in SETTINGS:
        return []
    key, is_set, value = last.partition("=")
    if is_set:
        return [f"{key}={found}" for found in _values(name, key.lstrip("+"), value)]
    return _next_parts(last, [f"{setting}=" for setting in _keys(name)])


def for_shell(shell: str, line: str) -> list[str]:
    """`candidates`, as the shell replaces them: bash replaces only what follows the last `=` or `:`."""
    last = "" if not line or line[-1].isspace() else line.split()[-1]
    kept = max(last.rfind("="), last.rfind(":")) + 1 if shell == "bash" else 0
    return [found[kept:] for found in candidates(line)]


def options_of(name: str) -> list[str]:
    """The options that the help of a command lists."""
    if SUBCOMMANDS[name].is_entry:
        return ["--cfg", "--config-dir", "--help", "--multirun"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        resolve(SUBCOMMANDS[name].target)(["--help"], program=f"octet {name}")
    return sorted(set(re.findall(r"--[a-z][a-z-]*\b", text.getvalue())))


def _starting(prefix: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _next_parts(prefix: str, names: Iterable[str]) -> list[str]:
    """Names up to their next dot, so that a section is offered before its settings."""
    found: dict[str, None] = {}
    for name in _starting(prefix, names):
        end = name.find(".", len(prefix)) + 1
        found[name[:end] if end else name] = None
    return list(found)


def _schema(name: str) -> type:
    from configs.compose import SCHEMAS

    return SCHEMAS[SETTINGS[name]]


def _groups(name: str) -> dict[str, list[str]]:
    """Groups of configuration files with their options; `export` has none."""
    from configs.compose import CONFIG_DIR
    from configs.overrides import groups

    return {} if name == "export" else groups([CONFIG_DIR])


def _keys(name: str) -> list[str]:
    from configs.overrides import key_types, open_keys

    groups = ["+experiment" if group == "experiment" else group for group in _groups(name)]
    added = open_keys(_schema(name))  # free mappings: their keys are new
    settings = [f"+{key}" if key in added else key for key in key_types(_schema(name))]
    return list(dict.fromkeys([*groups, *settings]))


def _values(name: str, key: str, value: str) -> list[str]:
    """Values of a setting: options of a group, its choices, true and false, or files."""
    options = _groups(name)
    if key in options:
        return _starting(value, options[key])
    field, kind = _field(_schema(name), key)
    if field is None:
        return []
    if field.metadata.get("choices"):
        start = max(value.rfind("["), value.rfind(",")) + 1  # of the last item of a list
        return [
            value[:start] + item for item in _starting(value[start:], map(str, field.metadata["choices"]))
        ]
    if kind is bool:
        return _starting(value, ("true", "false"))
    return _files(value) if key.rpartition(".")[2] in PATHS else []


def _field(schema: type, key: str) -> tuple[dataclasses.Field[Any] | None, Any]:
    """The field of a dotted key, and its type."""
    first, _, rest = key.partition(".")
    field = {field.name: field for field in dataclasses.fields(schema)}.get(first)
    if field is None:
        return None, None
    kind = get_type_hints(schema)[first]
    if not rest:
        return field, kind
    return _field(kind, rest) if dataclasses.is_dataclass(kind) else (None, None)  # type: ignore[arg-type]


def _files(prefix: str) -> list[str]:
    """Paths that begin so; folders end with a slash."""
    folder, _, start = prefix.rpartition("/")
    given = f"{folder}/" if "/" in prefix else ""
    try:
        entries = sorted(Path(given or ".").iterdir())
    except OSError:
        return []
    return [
        f"{given}{path.name}{'/' if path.is_dir() else ''}"
        for path in entries
        if path.name.startswith(start) and (start or not path.name.startswith("."))
    ]
