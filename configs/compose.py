"""Compose the YAML tree into typed, validated dataclasses, and explain what went wrong where that fails.

`hydra_entry` (configs.entry) is for the command line; `compose` is the same for Python and tests.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from configs.deploy_schema import ExportConfig
from configs.overrides import check_overrides, experiments, known_keys
from configs.schema import Config
from configs.trust import check_config_dirs, read_settings, refuse_factories, texts
from configs.validation import validate
from core.errors import ConfigError
from core.names import closest

CONFIG_DIR = Path(__file__).resolve().parent
SCHEMAS: dict[str, type] = {"config": Config, "export": ExportConfig}  # primary YAML file -> its dataclass
HYDRA_VERSION_BASE = "1.3"

AnyConfig = TypeVar("AnyConfig", Config, ExportConfig)


def register_configs() -> None:
    """Tell Hydra which dataclasses `config.yaml` and `export.yaml` are checked against; may be repeated."""
    store = ConfigStore.instance()
    store.store(name="train_qat_schema", node=Config)
    store.store(name="export_schema", node=ExportConfig)


def load(cfg: DictConfig, schema: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    """Turn a composed DictConfig into a validated dataclass instance.

    Raises:
        ConfigError: a mandatory key is missing, or a value is out of its limits.
    """
    try:
        config = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(explain(error, schema)) from error
    if not isinstance(config, schema):
        raise ConfigError(
            f"This is a {type(config).__name__}: expected {schema.__name__}; compose it with its schema."
        )
    if isinstance(config, Config):
        config.resume = config.resume.lower()  # YAML's true and false
    validate(config)
    if isinstance(config, Config):
        config.data.image_size = config.data.input_size.plain  # [640, 640] is the square that 640 is
    return config


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[Path] = ()) -> Config:
    """Compose `train_qat.py`'s configuration from overrides as typed on the command line.

    Args:
        overrides: For instance `["+experiment=demo", "seed=3"]`.
        config_dirs: Folders with further groups, as `--config-dir` gives them.

    Raises:
        ConfigError: unknown key, group option or experiment; wrong type; value out of its limits.
    """
    return _compose("config", Config, overrides, config_dirs)


def compose_export(overrides: Sequence[str]) -> ExportConfig:
    """Compose `export.py`'s configuration; the same errors as `compose`."""
    return _compose("export", ExportConfig, overrides, ())


def _compose(
    name: str, schema: type[AnyConfig], overrides: Sequence[str], config_dirs: Sequence[Path]
) -> AnyConfig:
    return load(_composed(name, schema, overrides, config_dirs), schema)


def usual_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a command line before they are checked, as nested plain data; "???" where one must be given."""
    settings = OmegaConf.to_container(_composed("config", Config, overrides, ()), resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _composed(
    name: str, schema: type[AnyConfig], overrides: Sequence[str], config_dirs: Sequence[Path]
) -> DictConfig:
    register_configs()
    check_config_dirs(config_dirs, "trust=true" in overrides)
    check_overrides(overrides, schema, [CONFIG_DIR, *config_dirs])
    places = ",".join(f"file://{Path(path).resolve()}" for path in config_dirs)
    extra: list[str] = [f"hydra.searchpath=[{places}]"] if places else []
    outer = GlobalHydra.instance()  # of the entry, where one runs
    running = outer.hydra
    outer.clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=HYDRA_VERSION_BASE):
            return hydra_compose(name, overrides=[*overrides, *extra])
    except (OmegaConfBaseException, HydraException, YAMLError) as error:
        raise ConfigError(explain(error, schema)) from error
    finally:
        GlobalHydra.instance().hydra = running


def dump(config: Config | ExportConfig) -> str:
    """Return the configuration as YAML; `read` takes it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read(path: Path, schema: type[AnyConfig] = Config, trust: bool = False) -> AnyConfig:  # type: ignore[assignment]
    """Read a configuration that `dump` wrote, checked like one from the command line.

    Args:
        path: a run's config.yaml, which may be untrusted.
        schema: what it must fit.
        trust: whether the user said that the code which the file names may run; what the file says of this is ignored.

    Raises:
        ConfigError: the file is absent, is not YAML, does not fit the schema, or names code without `trust`.
    """
    try:
        content = read_settings(path)
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path} holds a {type(content).__name__}: expected settings by name; use a run's config.yaml."
            )
        if any("${" in text for text in texts(content)):
            raise ConfigError(
                f"{path} has an interpolation (${{...}}): expected values as a run writes them."
            )
        loaded = OmegaConf.load(path)  # reads numbers as Hydra does
        merged = OmegaConf.merge(OmegaConf.structured(schema), loaded)
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a run's configuration, found no readable file ({error.strerror})."
        ) from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error, schema)}") from error
    assert isinstance(merged, DictConfig)
    config = load(merged, schema)
    config.trust = trust
    if not trust:
        refuse_factories(config, path)
    return config


def explain(error: BaseException, schema: type) -> str:
    """Turn a Hydra, OmegaConf or YAML error into a sentence that names key and, where known, remedy."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, MissingMandatoryValue):
            return _explain_missing(str(link))
        if isinstance(link, OmegaConfBaseException):
            return _explain_omegaconf(link, schema)
        if isinstance(link, YAMLError):
            return f"A YAML file cannot be read: {_first_line(' '.join(str(link).split()))}"
    return " ".join(str(error).split()) or "no further information"  # remedies are in later lines


def _explain_missing(message: str) -> str:
    key = re.search(r"Missing mandatory value: ([\w.]+)|full_key: ([\w.\[\]]+)", message)
    name = next((group for group in key.groups() if group), "") if key else ""
    if name == "experiment":
        names = ", ".join(experiments([CONFIG_DIR]))
        return f"No experiment is chosen; add +experiment=NAME with one of {names}."
    if name == "run":
        return "No run is named; add run=DIRECTORY, for instance run=runs/demo/latest."
    return f"{name or 'A mandatory key'} has no value; add {name or 'KEY'}=VALUE."


def _explain_omegaconf(error: OmegaConfBaseException, schema: type) -> str:
    full_key: Any = error.full_key
    message = _first_line(str(error.msg or error))
    if re.search(r"not in '|not in struct", message):
        near = _closest_key(str(full_key), str(error.key), error.object_type, schema)
        remedy = f"closest: {near}." if near else "docs/configuration.md lists all keys."
        return f"Unknown key {full_key}; {remedy}"
    if message.endswith("is not Optional"):
        return f"{full_key}=null: expected a value; leave {full_key} out for the default."
    return f"{full_key}: {message}" if full_key else message


def _closest_key(full_key: str, key: str, section: Any, schema: type) -> str | None:
    """Look for the key meant: first in the section it was written in, then in the whole schema."""
    prefix = full_key.removesuffix(key)
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        near = closest(full_key, [prefix + name for name in known_keys(section)])
        if near:
            return near
    return closest(full_key, known_keys(schema))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no further information"
