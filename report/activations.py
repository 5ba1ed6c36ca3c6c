"""What `quant.swap_activation=auto` measured, in the reports: a table of the activations and which one was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report.tables import MISSING

TITLE = "Activation"


def caption(content: Mapping[str, Any]) -> str:
    """What the figures are of, and the rule."""
    return (
        f"Calibrated INT8 networks before fine-tuning, timed in {content['subject']}, batch {content['batch']}. The "
        f"fastest is chosen that loses at most {content['max_loss']:g} and saves at least "
        f"{content['min_time_saved']:.0%} of the time, else SiLU"
    )


def headings(content: Mapping[str, Any]) -> list[str]:
    """Headings of `activation_lines`; the measure is AP, mask AP or the user's metric."""
    return ["Activation", f"{content['measure']} after calibration", "Latency, median [ms]", "Chosen"]


def view(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Title, caption and table for the page; None where nothing was measured."""
    if content is None:
        return None
    table = {"keys": headings(content), "lines": activation_lines(content)}
    return {"title": TITLE, "caption": caption(content), "table": table}


def activation_lines(content: Mapping[str, Any]) -> list[list[str]]:
    """One line of text cells for each activation, see `headings`."""
    return [
        [
            item["activation"],
            MISSING if item["ap"] is None else f"{item['ap']:.4f}",
            f"{item['milliseconds']:.2f}",
            "yes" if item["is_chosen"] else "",
        ]
        for item in content["candidates"]
    ]
