"""What differs between TensorRT versions, in one table. The only file that imports `tensorrt`.

| | 8.6 | 10 | 11 |
|---|---|---|---|
| network flag EXPLICIT_BATCH | required | present, unnecessary | gone |
| network flag STRONGLY_TYPED | absent | optional | always on |
| builder flags INT8, FP16 | yes | yes, deprecated | gone |

Everything else this project calls (named tensors, execute_async_v3, memory pools, timing cache, inspector) is the
same in all of them. The tests compare every name and call with the real bindings of five versions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from core.errors import DeployError

LOGGER = logging.getLogger(__name__)
OLDEST = (8, 6)
NEWEST_MAJOR = 11


@dataclass(frozen=True)
class VersionRules:
    """How a TensorRT version is spoken to.

    Attributes:
        explicit_batch_flag: networks need EXPLICIT_BATCH.
        can_be_strongly_typed: the file's types can be taken as they are.
        always_strongly_typed: they always are, and there is no flag for it to set.
        precision_flags: BuilderFlag.INT8 and FP16 exist.
        max_opset: newest ONNX operator set its parser reads.
    """

    explicit_batch_flag: bool
    can_be_strongly_typed: bool
    always_strongly_typed: bool
    precision_flags: bool
    max_opset: int


RULES: dict[int, VersionRules] = {
    8: VersionRules(True, False, False, True, 17),
    10: VersionRules(False, True, False, True, 23),
    11: VersionRules(False, True, True, False, 25),
}


def import_tensorrt() -> Any:
    """The tensorrt module.

    Raises:
        DeployError: it is not installed, with the ways to get it.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise DeployError(
            "TensorRT is not installed. Run inside NVIDIA's container: docker build -t octet . and docker run --gpus "
            "all octet COMMAND (docs/deployment.md); for Jetson see docs/jetson.md; elsewhere pip install tensorrt on "
            "a machine with an NVIDIA GPU."
        ) from error
    return tensorrt


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of a text such as "10.3.0"; raises DeployError for any other text."""
    parts = text.split(".")
    if len(parts) < 2 or not parts[0].isdecimal() or not parts[1].isdecimal():
        raise DeployError(f"'{text}' is not a TensorRT version; expected MAJOR.MINOR.")
    return int(parts[0]), int(parts[1])


def rules_of(version: str) -> VersionRules:
    """Rules of a version; raises DeployError below 8.6 and for 9, takes the newest rules for versions not known yet."""
    major, minor = parse_version(version)
    if (major, minor) < OLDEST:
        raise DeployError(
            f"TensorRT {version} is too old: 8.6 is the oldest that is supported. Use a newer container."
        )
    if major not in RULES and major <= NEWEST_MAJOR:
        raise DeployError(f"TensorRT {version} is not supported; {', '.join(map(str, RULES))} are.")
    if major > NEWEST_MAJOR:
        LOGGER.warning(
            "TensorRT %s is newer than any version known here; treating it as %d.", version, NEWEST_MAJOR
        )
        major = NEWEST_MAJOR
    return RULES[major]


def check_target(target: str) -> None:
    """Raise DeployError unless the installed TensorRT builds graphs that were exported for `target`."""
    version = str(import_tensorrt().__version__)
    rules = rules_of(version)
    if target == "trt10" and rules.always_strongly_typed:
        raise DeployError(
            f"TensorRT {version} builds strongly typed networks only; export with target=trt11."
        )
    if target == "trt11" and not rules.can_be_strongly_typed:
        raise DeployError(f"TensorRT {version} has no strongly typed networks; export with target=trt10.")


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that writes to `logging`, and keeps errors in `.errors` for messages."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
                LOGGER.error("%s", message)
            elif severity == trt.ILogger.WARNING:
                LOGGER.warning("%s", message)
            else:
                LOGGER.debug("%s", message)

    return Logger()
