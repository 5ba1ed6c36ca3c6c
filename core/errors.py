"""Every error that a user can get, and the exit code of each.

A message names the value that was found, what was expected, and what to do about it. Commands print the message and
leave with `exit_code`; any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_DEFECT = 1  # of Python, with a traceback
EXIT_CONFIG = 2
EXIT_INPUT = 3
EXIT_GATE = 4
EXIT_REQUEUE = 75
EXIT_HANGUP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_BROKEN_PIPE = 141


class OctetError(Exception):
    """Base of all errors with a message for the user.

    Attributes:
        exit_code: 2 for configuration, 3 for data, checkpoints and engines, 4 for a gate that is not met.
    """

    exit_code: int = EXIT_INPUT


# -- configuration: exit code 2


class ConfigError(OctetError, ValueError):
    """A configuration that cannot run."""

    exit_code = EXIT_CONFIG


class PolicyError(ConfigError):
    """A placement rule is malformed or matches nothing."""


class PlacementError(ConfigError):
    """A placement cannot be read, or does not fit the network. It is edited by hand, as a setting is: exit code 2."""


class RunError(ConfigError):
    """A run directory lacks what a stage needs, or holds another run."""


class StateError(RunError):
    """The saved state of a stopped run is damaged."""

    exit_code = EXIT_INPUT


class TraceError(ConfigError):
    """The network cannot be turned into an fx graph."""


class DistillationError(ConfigError):
    """The tensors that distillation is to compare do not exist."""


# -- data, checkpoints, engines: exit code 3


class DataError(OctetError, ValueError):
    """A dataset, an image or an annotation that cannot be used."""


class CheckpointError(OctetError, ValueError):
    """A checkpoint cannot be read, is refused, or does not fit the network."""


class CalibrationError(OctetError, ValueError):
    """Calibration cannot give usable scales."""


class RangeError(OctetError, ValueError):
    """A range of a checkpoint does not fit the network."""


class DivergenceError(OctetError, RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class DeployError(OctetError, RuntimeError):
    """A graph, an engine or a runtime cannot be used."""


class KernelError(OctetError, RuntimeError):
    """The native kernel of fake quantization cannot be built or loaded here."""


class ReportError(OctetError, ValueError):
    """A report cannot be made."""


class ResourceError(OctetError, RuntimeError):
    """The memory is used up."""


class WriteError(OctetError, OSError):
    """A file cannot be written."""


class TeamError(OctetError, RuntimeError):
    """Another process of the job has failed, or is gone."""

    @classmethod
    def of(cls, message: str, exit_code: int) -> TeamError:
        """With the exit code of the process that failed."""
        error = cls(message)
        error.exit_code = exit_code
        return error


# -- gates: exit code 4


class GateError(OctetError, RuntimeError):
    """The result misses an accuracy or speed gate that the user set."""

    exit_code = EXIT_GATE
