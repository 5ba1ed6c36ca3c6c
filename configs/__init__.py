"""Configuration: a Hydra tree, its typed schema, and errors that name the way out.

Inside the program settings travel as the dataclasses of `configs.schema`; Hydra and OmegaConf stay in here.
"""

from configs.compose import compose, compose_export, dump, explain, load, read, register_configs
from configs.deploy_schema import ExportConfig
from configs.entry import hydra_entry
from configs.schema import Config
from configs.validation import validate
from core.errors import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "ExportConfig",
    "compose",
    "compose_export",
    "dump",
    "explain",
    "hydra_entry",
    "load",
    "read",
    "register_configs",
    "validate",
]
