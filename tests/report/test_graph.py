"""The network graph of the report: what is folded, that no two boxes overlap, and which group a box belongs to."""

from __future__ import annotations

import itertools
from typing import Any

from report.graph import GAP_X, HEIGHT, WIDTH, arrange, draw, fold


def node(name: str, operator: str, *sources: int, precision: str = "int8") -> dict[str, Any]:
    return {"name": name, "operator": operator, "precision": precision, "sources": list(sources)}


SILU = [
    node("a.conv", "Conv"),
    node("a.act/Sigmoid", "Sigmoid", 0, precision="fp32"),
    node("a.act", "Mul", 0, 1, precision="fp32"),
    node("b.conv", "Conv", 2),
    node("join", "Add", 2, 3, precision="fp32"),
    node("cat", "Concat", 4),
    node("decode/Sigmoid", "Sigmoid", 5, precision="fp32"),
    node("odd", "Mul", 5, 6, precision="int4"),
]
GROUPS = [
    {"name": "a.act", "tensors": ["a.act"], "layers": ["b.conv"]},
    {"name": "join", "tensors": ["join", "cat"], "layers": []},
]


def test_an_activation_is_part_of_its_layer_and_nothing_else_is_folded() -> None:
    boxes = fold(SILU)
    assert [box.names for box in boxes] == [
        ["a.conv", "a.act/Sigmoid", "a.act"], ["b.conv"], ["join"], ["cat"], ["decode/Sigmoid"], ["odd"],
    ]  # fmt: skip
    assert [box.sources for box in boxes] == [[], [0], [0, 1], [2], [3], [3, 4]]
    assert [box.precision for box in boxes] == ["int8", "int8", "fp32", "int8", "fp32", "other"]


def test_a_deep_graph_fits_a_screen_and_boxes_do_not_overlap() -> None:
    chain = [node("0", "Conv")]
    for index in range(1, 300):  # with a side branch here and there
        chain.append(node(str(index), "Conv", index - 1, *([index - 7] if index % 9 == 8 else [])))
        if index % 20 == 0:
            chain[-1]["sources"] = [index - 2]
    boxes = fold(chain)
    width, height = arrange(boxes)
    assert 0.8 < width / height < 3
    for one, other in itertools.combinations(boxes, 2):
        assert abs(one.x - other.x) >= WIDTH + GAP_X or abs(one.y - other.y) >= HEIGHT
    assert all(0 <= box.x <= width - WIDTH and 0 <= box.y <= height - HEIGHT for box in boxes)


def test_details_name_groups_and_figures() -> None:
    view = draw(
        {"file": "m.onnx", "nodes": SILU, "groups": GROUPS},
        {"b.conv": {"macs": 1000, "parameters": 30}},
        {"a.act": 0.5},
    )
    first, second, third = view["details"]["boxes"][:3]
    assert (first["writes"], first["reads"]) == ("a.act", None)
    assert (second["writes"], second["reads"], second["macs"]) == (None, "a.act", 1000)
    assert third["writes"] == "join"
    assert view["details"]["scores"] == {"a.act": 0.5}
    assert view["counts"] == [("int8", 3), ("fp32", 2), ("other", 1)]
    assert len(view["edges"]) == 7


def test_an_empty_graph_is_drawn_as_nothing() -> None:
    assert draw({"file": "m.onnx", "nodes": [], "groups": []}, {}, {})["boxes"] == []
