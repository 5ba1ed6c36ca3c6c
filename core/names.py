"""Names in messages: what a misspelled one most likely means, and long lists cut short."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

LIKELY = 0.6  # similarity below which a suggestion would only confuse
MAX_SHOWN = 200  # characters of one name

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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
    return best if best_score >= LIKELY else None


def closest_hint(word: str, candidates: Sequence[str], label: str = "closest") -> str:
    """`"; closest: 'backbone.stem1.conv'"` for the end of a message, or "" where there is no candidate at all.

    Unlike `closest` it names the nearest candidate however far away it is: for patterns over a network's names, where
    an example of a real name helps in any case.
    """
    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.0)
    return f"; {label}: {found[0]!r}" if found else ""


def printable(text: str) -> str:
    r"""Text for a terminal: control characters, and marks that turn its direction, are written as escapes.

    Names of classes, tensors and files come from untrusted files; raw, they could recolour or rewrite what the
    terminal shows. Line ends and tabs stay.

    Example: the escape character becomes the four characters `\x1b`.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def listing(values: Iterable[str], limit: int = 10) -> str:
    """Join the first `limit` values for a message and count the rest; long values are cut.

    Example: `listing(["a", "b", "c"], limit=2)` is `"a, b, and 1 more"`.
    """
    listed = [value[:MAX_SHOWN] for value in values]
    hidden = len(listed) - limit
    shown = ", ".join(listed[:limit])
    return f"{shown}, and {hidden} more" if hidden > 0 else shown


def is_address(text: str) -> bool:
    """Whether a text that should be a path is an address, such as https://example.org/w.pt.

    `pathlib` joins its slashes, so that a path that was made of an address has one of them.
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}[^/]", text) is not None


def address_remedy(text: str) -> str:
    """What to do about an address where a path is expected."""
    return f"'{text}' is an address, and Octet downloads nothing: download it first, then give its path"
