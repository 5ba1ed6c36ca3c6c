"""What a run can end with, and the exit code of each: 2 configuration, 3 data or checkpoint, 4 gate not met."""

from __future__ import annotations

from configs.errors import ConfigError
from data import DataError
from deploy import DeployError
from models import CheckpointError
from quant import (
    CalibrationError,
    DivergenceError,
    InsertionError,
    PlanError,
    PolicyError,
    RangeError,
    TraceError,
)


class GateError(RuntimeError):
    """The result misses an accuracy or speed gate that the user set."""


class RunError(ValueError):
    """A run directory lacks what a stage needs, or holds another run."""


EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: 2,
    PolicyError: 2,
    PlanError: 2,
    InsertionError: 2,
    RunError: 2,
    TraceError: 2,
    DataError: 3,
    CheckpointError: 3,
    CalibrationError: 3,
    RangeError: 3,
    DivergenceError: 3,
    DeployError: 3,
    GateError: 4,
}
