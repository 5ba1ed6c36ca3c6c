"""The account of a dataset: what was left out between files and records, and what makes it unusable.

Readers count here instead of passing over things in silence, and collect faults instead of stopping at the first. So a
run tells what its figures are of, and `python -m data` lists all faults at once.
"""

import logging
from dataclasses import dataclass, field

from core.errors import DataError
from core.names import MAX_SHOWN

FAULTS_SHOWN = 5  # in one message
DUPLICATES = "Left out {number} objects that repeat another of the same image exactly"

_log = logging.getLogger(__name__)


@dataclass
class Note:
    """Something that was counted.

    Attributes:
        text: what it is, with `{number}` for the count.
        number: how often.
        examples: the first places.
        is_warning: whether figures may not be what the user expects.
    """

    text: str
    number: int = 0
    examples: list[str] = field(default_factory=list)
    is_warning: bool = True

    def sentence(self) -> str:
        """The text with its count, and the first place."""
        first = f"; the first: {self.examples[0]}" if self.examples and self.examples[0] else ""
        return f"{self.text.replace('{number}', str(self.number))}{first}."


class Inventory:
    """Notes and faults of one split.

    Args:
        collects: `refuse` lets the reader continue, for a command that reports everything; a run stops at it.
        max_examples: places kept for each note.
    """

    def __init__(self, collects: bool = False, max_examples: int = 20) -> None:
        self.collects = collects
        self.max_examples = max_examples
        self.notes: dict[str, Note] = {}
        self.faults: list[str] = []

    def note(self, text: str, example: object = "", number: int = 1, is_warning: bool = True) -> None:
        """Count something; `text` has `{number}` in it, and equal texts are counted together."""
        note = self.notes.setdefault(text, Note(text, is_warning=is_warning))
        note.number += number
        if len(note.examples) < self.max_examples:
            note.examples.append(str(example))

    def fault(self, text: str) -> None:
        """Something that makes the dataset unusable; the text names place, value and expectation."""
        self.faults.append(text)

    def refuse(self) -> None:
        """Raise what was found so far as one error.

        Raises:
            DataError: there are faults, and this inventory does not collect them.
        """
        if not self.faults or self.collects:
            return
        shown = [fault[: 3 * MAX_SHOWN] for fault in self.faults[:FAULTS_SHOWN]]
        if len(self.faults) == 1:
            raise DataError(shown[0])
        hidden = len(self.faults) - len(shown)
        more = f" And {hidden} more: `python -m data DATASET` lists all." if hidden else ""
        raise DataError(f"{len(self.faults)} faults. " + " ".join(shown) + more)

    def log(self) -> None:
        """Write every note to the log, one line each."""
        for note in self.notes.values():
            _log.log(logging.WARNING if note.is_warning else logging.INFO, "%s", note.sentence())
