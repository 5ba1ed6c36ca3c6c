"""Policy: an ordered list of rules over names; the last rule that matches a name decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from core.choices import FP8, GRIDS, OBSERVERS
from core.errors import PolicyError
from core.names import closest_hint


@dataclass(frozen=True)
class Rule:
    """One policy rule; fields left at None say nothing.

    Attributes:
        match: shell-style pattern over layer names (`head.cls.0.2`) and activation tensors (`backbone.stem1.act`).
        keep_float: leave the matched layers, or all layers that read the matched tensors, in float (or, with
            False, quantize layers that would stay float by default).
        bits: width of the matched weights or activations, 2 to 8.
        scale: fixed positive scale of the matched activations; calibration and fine-tuning leave it alone.
        observer: calibration method of the matched activations.
        grid: kind of the grid of the matched activations, and of the weights of the layers that read them: `integer` or
            `fp8`.
        share: whether the matched concats share one scale over their inputs.
    """

    match: str
    keep_float: bool | None = None
    bits: int | None = None
    scale: float | None = None
    observer: str | None = None
    share: bool | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise PolicyError(
                f"rule {self.match!r}: {self.bits} bits; expected 2 to 8, or `keep_float: true`"
            )
        if self.grid is not None and self.grid not in GRIDS:
            raise PolicyError(f"rule {self.match!r}: grid {self.grid!r}; expected one of {', '.join(GRIDS)}")
        if self.grid == FP8 and self.bits not in (None, 8):
            raise PolicyError(f"rule {self.match!r}: {self.bits} bits; an FP8 grid has 8: leave `bits` out")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise PolicyError(f"rule {self.match!r}: scale {self.scale}; expected a positive finite number")
        if self.observer is not None and self.observer not in OBSERVERS:
            raise PolicyError(
                f"rule {self.match!r}: observer {self.observer!r}; expected one of {', '.join(OBSERVERS)}"
            )


class Policy:
    """Answers, for each name, what the rules say; the last rule that says something decides."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)

    def lookup(self, field: str, names: Iterable[str]) -> Any:
        """Value that the last matching rule gives to `field`, or None."""
        rule = self.decisive(field, names)
        return None if rule is None else getattr(rule, field)

    def decisive(self, field: str, names: Iterable[str]) -> Rule | None:
        """The last matching rule that says something about `field`."""
        wanted = list(names)
        for rule in reversed(self.rules):
            if getattr(rule, field) is not None and any(fnmatchcase(name, rule.match) for name in wanted):
                return rule
        return None

    def check(self, layers: Sequence[str], tensors: Sequence[str], concats: Sequence[str]) -> None:
        """Raise PolicyError for a rule without effect: it matches nothing, or nothing that its fields apply to."""
        scope = {
            "keep_float": ("layers and activation tensors", [*layers, *tensors]),
            "bits": ("layers and activation tensors", [*layers, *tensors]),
            "scale": ("activation tensors", tensors),
            "grid": ("activation tensors", tensors),
            "observer": ("activation tensors", tensors),
            "share": ("concats", concats),
        }
        known = [*layers, *tensors, *concats]
        for rule in self.rules:
            matched = [name for name in known if fnmatchcase(name, rule.match)]
            if not matched:
                hint = closest_hint(rule.match, known)
                raise PolicyError(f"rule {rule.match!r} matched no layer, tensor or concat{hint}")
            for field, (what, names) in scope.items():
                if getattr(rule, field) is None or any(fnmatchcase(name, rule.match) for name in names):
                    continue
                hint = closest_hint(rule.match, names, "closest of those")
                raise PolicyError(
                    f"rule {rule.match!r} sets `{field}`, which applies to {what}; it matched only "
                    f"{matched[0]!r} and others of its kind{hint}"
                )
