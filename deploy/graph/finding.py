"""What a rule of the graph check reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from deploy.graph.view import View


@dataclass(frozen=True)
class Finding:
    """One thing in a graph that costs speed or accuracy.

    Attributes:
        name: node or tensor it is about.
        hazard: what is there and what it costs.
        remedy: what to do.
        rule: short name of the rule.
        reformats: extra kernels that it costs, if known.
    """

    name: str
    hazard: str
    remedy: str
    rule: str
    reformats: int = 0

    def as_dict(self) -> dict[str, object]:
        """Plain dict, ready for JSON."""
        return asdict(self)


Findings = Iterator[Finding]
Rule = Callable[[View], Findings]
