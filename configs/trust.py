"""What untrusted configuration files may not do: name code, and reach into Hydra's own machinery.

A run directory's config.yaml and the files of `--config-dir` may come from anybody. Three kinds of entries in them
would run code: the `factory` settings, Hydra's `_target_` (a function that Hydra calls), and logging configurations
(`()` and `class` do the same). They count where the user typed them, or where the user says `trust=true`. Sizes are
limited, too: anchors and interpolations can make 10^9 entries of a small file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.documents import MEBIBYTE, DocumentError, parse_yaml, read_text, shown
from core.errors import ConfigError

MAX_FILES = 1000  # of a --config-dir tree
MAX_FILE_BYTES = MEBIBYTE
MAX_ENTRIES = 10_000  # of one file, counting what aliases repeat
MAX_INTERPOLATIONS = 3  # in one value
MAX_PRODUCTS = 8  # values with more than one interpolation, in the whole tree
FACTORIES = ("model", "data", "metric")  # sections with a setting `factory`
CALLS = ("_target_", "()")
HYDRA_SECTIONS = ("sweeper", "launcher", "sweep", "run", "mode", "verbose")  # of `hydra:`, plain values
REMEDY = "if the file is yours and you know what it runs, add trust=true"


def read_settings(path: Path) -> Any:
    """Plain data of a YAML file with settings, within the limits of this module.

    Raises:
        ConfigError: it is not YAML, too large, too deep, or stands for too many entries.
        OSError: it cannot be read.
    """
    try:
        return parse_yaml(read_text(path, MAX_FILE_BYTES), MAX_ENTRIES)
    except DocumentError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def refuse_factories(config: Any, path: Path) -> None:
    """Refuse a run's configuration that names code.

    Args:
        config: the typed configuration.
        path: where it was read, for the message.

    Raises:
        ConfigError: it names a factory.
    """
    sections = {name: getattr(config, name, None) for name in FACTORIES}
    named = [
        f"{name}.factory={section.factory}"
        for name, section in sections.items()
        if section and section.factory
    ]
    if named:
        raise ConfigError(
            f"{path} names Python code that this command would run: {', '.join(named)}. Code counts where you typed "
            f"it; {REMEDY} (--trust of commands with dashes)."
        )


def check_config_dirs(folders: Sequence[Path], trust: bool) -> None:
    """Check every YAML file of trees that are not Octet's before Hydra reads them.

    Args:
        folders: of `--config-dir` and `hydra.searchpath`.
        trust: whether the user said `trust=true`: code is accepted; sizes are checked in any case.

    Raises:
        ConfigError: a file is outside of the limits, or names code.
    """
    products = 0
    for path in _yaml_files(folders):
        content = read_settings(path)
        defaults = content.get("defaults", []) if isinstance(content, dict) else []
        is_sound = isinstance(defaults, list) and all(_is_default(entry) for entry in defaults)
        if not isinstance(content, dict | None) or not is_sound:
            raise ConfigError(
                f"{path} holds {shown(content)}: expected settings by name, and defaults as a list."
            )
        counts = [text.count("${") for text in texts(content)]
        products += sum(count > 1 for count in counts)
        if products > MAX_PRODUCTS or max(counts, default=0) > MAX_INTERPOLATIONS:
            raise ConfigError(
                f"{path}: at most {MAX_PRODUCTS} values may have several interpolations (${{...}}), with at most "
                f"{MAX_INTERPOLATIONS} in one; write the values out."
            )
        problem = None if trust else _code_in(path, content)
        if problem is not None:
            raise ConfigError(f"{path} {problem}: files of --config-dir hold settings only; {REMEDY}.")


def _is_default(entry: Any) -> bool:
    """Whether an entry of a defaults list is one that Hydra reads: a name, or one group with its option or options."""
    if not isinstance(entry, dict):
        return isinstance(entry, str) and "\0" not in entry
    options = list(entry.values())
    names = options[0] if len(options) == 1 and isinstance(options[0], list) else options
    return len(options) == 1 and all(
        name is None or (isinstance(name, str) and "\0" not in name) for name in (*entry, *names)
    )


def _yaml_files(folders: Sequence[Path]) -> Iterator[Path]:
    number = 0
    for folder in folders:
        for path in sorted((*folder.glob("*.y*ml"), *folder.glob("*/**/*.y*ml"))):
            number += 1
            if number > MAX_FILES:
                raise ConfigError(
                    f"{folder} has more than {MAX_FILES} YAML files: it is not a folder of settings."
                )
            yield path


def _code_in(path: Path, content: Any) -> str | None:
    """What a file names that would run, in words; None where there is nothing."""
    if "hydra" in path.parts[:-1][-2:] or re.search(
        r"@\s*package\s+hydra", path.read_text(encoding="utf-8-sig")
    ):
        return "belongs to Hydra's own settings"
    for key, value in _entries(content):
        if key in CALLS:
            return f"has {key}: {shown(value)}, which Hydra would call"
        if key == "factory" and value is not None:
            return f"names Python code, factory: {shown(value)}"
        if "@hydra" in key or (key.startswith(("hydra.", "hydra/")) and "@" in key):
            return f"puts {key!r} into Hydra's own settings"
    settings = content.get("hydra") if isinstance(content, dict) else None
    if isinstance(settings, dict):
        odd = [key for key in settings if key not in HYDRA_SECTIONS]
        return f"sets hydra.{shown(odd[0])}" if odd else None
    return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def texts(value: Any) -> Iterator[str]:
    """Every text, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
