"""Pictures with what several models find in them: one picture, and boxes as data that the page draws over it."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import ReportError

JPEG_SIGNATURE = b"\xff\xd8\xff"


@dataclass(frozen=True)
class DetectionView:
    """What one model, or the ground truth, has in a picture.

    Attributes:
        name: of the row, or "ground truth".
        boxes: [N, 6] x1, y1, x2, y2 in pixels of the picture, score 0..1 (None for ground truth), class index.
        alone: for each box whether the view that it is compared with has none of its class there; may be empty.
        outlines: for each box the polygons of its mask, each a list of x, y in turn; empty without masks.
    """

    name: str
    boxes: Sequence[Sequence[float | None]]
    alone: Sequence[bool] = ()
    outlines: Sequence[Sequence[Sequence[float]]] = ()


@dataclass(frozen=True)
class DetectionPanel:
    """One picture and its views.

    Attributes:
        title: what is shown, e.g. the file's name.
        picture: JPEG bytes.
        size: (height, width) of the picture, pixels.
        views: in the order to be shown.
        remark: why the picture is here, e.g. "3 boxes differ".
    """

    title: str
    picture: bytes
    size: tuple[int, int]
    views: Sequence[DetectionView] = field(default=())
    remark: str = ""

    def check(self, num_classes: int) -> None:
        """Raise ReportError where it cannot be shown."""
        if not self.picture.startswith(JPEG_SIGNATURE):
            raise ReportError(f"the picture '{self.title}' is not a JPEG (starts with {self.picture[:8]!r}).")
        for view in self.views:
            for box in view.boxes:
                numbers = [value for value in box if value is not None]
                if len(box) != 6 or not all(math.isfinite(value) for value in numbers):
                    raise ReportError(
                        f"a box of '{view.name}' in '{self.title}' is {list(box)}: expected x1, y1, x2, y2, "
                        "score, class."
                    )
                if box[5] is None or not 0 <= box[5] < num_classes:
                    raise ReportError(
                        f"a box of '{view.name}' in '{self.title}' has class {box[5]}: expected one of "
                        f"{num_classes} class names, from 0."
                    )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; the picture is base64."""
        views = [
            {
                "name": view.name,
                "boxes": [list(box) for box in view.boxes],
                "alone": list(view.alone),
                "outlines": [[list(polygon) for polygon in shape] for shape in view.outlines],
            }
            for view in self.views
        ]
        picture = base64.b64encode(self.picture).decode("ascii")
        return {
            "title": self.title,
            "remark": self.remark,
            "size": list(self.size),
            "views": views,
            "picture": picture,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DetectionPanel:
        """Read back what `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not a panel.
        """
        try:
            picture = base64.b64decode(content["picture"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"the picture '{content['title']}' is not base64: {error}") from error
        height, width = (int(side) for side in content["size"])
        views = [DetectionView(**view) for view in content["views"]]
        return cls(str(content["title"]), picture, (height, width), views, str(content["remark"]))


def drawn_panel(panel: DetectionPanel, names: Sequence[str]) -> dict[str, Any]:
    """What the page needs to draw a panel: sizes in pixels of the picture, labels, one colour number per class."""
    height, width = panel.size
    line = max(1.0, min(height, width) / 220)
    return {
        "title": panel.title,
        "remark": panel.remark,
        "width": width,
        "height": height,
        "line": round(line, 2),
        "font": round(max(9.0, min(height, width) / 26), 1),
        "address": "data:image/jpeg;base64," + base64.b64encode(panel.picture).decode("ascii"),
        "views": [
            {"name": view.name, "boxes": [_drawn_box(view, index, names) for index in _order(view)]}
            for view in panel.views
        ],
    }


def _order(view: DetectionView) -> list[int]:
    """Boxes by rising score, so that the highest lies on top."""
    return sorted(range(len(view.boxes)), key=lambda index: view.boxes[index][4] or 0.0)


def _drawn_box(view: DetectionView, index: int, names: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2, score, label = view.boxes[index]
    left, right = sorted((float(x1 or 0), float(x2 or 0)))
    top, bottom = sorted((float(y1 or 0), float(y2 or 0)))
    number = int(label or 0)
    shapes = view.outlines[index] if index < len(view.outlines) else ()
    return {
        "x": round(left, 1),
        "y": round(top, 1),
        "width": round(right - left, 1),
        "height": round(bottom - top, 1),
        "label": names[number] + ("" if score is None else f" {score:.2f}"),
        "colour": number % 7,
        "alone": index < len(view.alone) and bool(view.alone[index]),
        "outlines": [" ".join(f"{value:.1f}" for value in polygon) for polygon in shapes],
    }
