"""The one error of the configuration room: entries turn it into one readable message and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot run; its message names the value, the expectation and the remedy."""


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` most likely means, or None where nothing comes near.

    A dotted candidate also competes with its last part, so the bare `epcohs` finds `train.epochs`.
    Among equals the earliest candidate wins.

    Example: `closest("epcohs", ["seed", "train.epochs", "qat.epochs"]) == "train.epochs"`
    """
    word = word.lower()
    best_score, best = 0.0, None
    for candidate in candidates:
        names = (
            {candidate.lower()} if "." in word else {candidate.lower(), candidate.lower().rsplit(".", 1)[-1]}
        )
        score = max(difflib.SequenceMatcher(a=word, b=name).ratio() for name in names)
        if score > best_score:
            best_score, best = score, candidate
    return best if best_score >= 0.6 else None
