"""One invented run that fills every part of a report; the figures mean nothing."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from core.operating_point import Agreement, OperatingPoint, PointFigures
from core.rows import ResultRow, RowKey, RowKind
from report import DetectionPanel, DetectionView, ReportData

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def make_row(name: str, *figures: float, **named: object) -> ResultRow:
    """A row by its name."""
    kind, *engine = name.split(":")
    return ResultRow(RowKey(RowKind(kind), *engine), *figures, **named)  # type: ignore[arg-type]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, format="JPEG")
    return buffer.getvalue()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, (120, 160, 3), dtype=np.uint8)


def sample_point(matched: float | None = None, shift: float = 0.0) -> OperatingPoint:
    """An operating point with two classes, beside the float model where `matched` is given."""
    agreement = None if matched is None else Agreement(200, matched, 0.015, shift, abs(shift))
    curve = tuple(round(0.9 - abs(step - 30) / 100, 6) for step in range(101))
    overall = PointFigures(220, 210, 0.8, 0.75, 0.7742, agreement)
    nothing = PointFigures(4, 0, None, 0.0, 0.0, agreement and Agreement(0, None, None, None, None))
    return OperatingPoint(0.25, overall, {"cell": overall, EVIL: nothing}, curve, 0.3)


def sample_draws(mean: float, spread: float = 0.02) -> tuple[float, ...]:
    """Draws of one seed, so that those of two rows are paired."""
    return tuple((mean + spread * np.random.default_rng(3).standard_normal(200)).round(6).tolist())


def sample_rows() -> list[ResultRow]:
    return [
        make_row(
            "float",
            0.5984,
            0.8879,
            0.83,
            0.84,
            size_bytes=8_000_000,
            extras={"ap_small": 0.31, "images": 73, "per_class_ap": {"cell": 0.7, EVIL: 0.5}},
            operating_point=sample_point(),
            draws=sample_draws(0.5984),
        ),
        make_row(
            "ptq", 0.5973, 0.8861, 0.82, 0.84, size_bytes=8_000_000, operating_point=sample_point(0.93, -0.02)
        ),
        make_row("qat", 0.5991, 0.8884, 0.84, 0.84, size_bytes=8_000_000),
        make_row("engine:openvino:f32", 0.5984, 0.8879, 0.83, 0.84, 20.0, 24.0, 50.0, 8_000_000),
        make_row(
            "engine:openvino:int8",
            0.5990,
            0.8882,
            0.84,
            0.84,
            10.0,
            11.0,
            100.0,
            2_000_000,
            extras={"images": 73},
            operating_point=sample_point(0.995, 0.001),
            draws=sample_draws(0.5990, 0.021),
        ),
    ]


def curves(stage: str, validated_epochs: int) -> list[dict[str, Any]]:
    """Return 200 records with the keys that the stages write, the last ones of the epochs with a validation."""
    records: list[dict[str, Any]] = []
    for step in range(0, 400, 2):
        record = {
            "stage": stage,
            "step": step,
            "epoch": step // 100,
            "learning_rate": 1e-4 * (1 - step / 400),
            "gradient_norm": 12.0 / (1 + step),
            "seconds": 0.4,
            "box": 1.2 * math.exp(-step / 200),
            "cls": 0.6 * math.exp(-step / 150),
            "distillation": 0.1,
        }
        if step % 100 == 98 and step // 100 < validated_epochs:
            record |= {"validation": 0.59 + step / 1e5, "share_oscillating": 0.058, "share_frozen": 0.0}
        records.append(record)
    return records


def sample_autotune() -> dict[str, Any]:
    """A front of three plans on a GPU; the one in the middle is chosen."""
    figures = [
        ("all float", {"float": 9}, 3.0, 0.0, 0.0),
        ("all int8", {"int8": 9}, 2.5, 0.02, 0.018),
        ("all fp8", {"float": 1, "fp8": 8}, 2.0, 0.03, 0.031),
        ("front", {"float": 3, "int8": 2, "fp8": 4}, 1.5, 0.004, 0.003),
    ]
    return {
        "latency": "estimated",
        "subject": EVIL,
        "gpu": {"name": "l4"},
        "front": [
            {
                "milliseconds": milliseconds,
                "estimated_ap_loss": loss,
                "units": {"fp8": 8 - index, "float": 1 + index},
            }
            for index, (milliseconds, loss) in enumerate([(1.2, 0.01), (1.5, 0.004), (3.0, 0.0)])
        ],
        "confirmed": [
            {
                "name": name,
                "units": units,
                "expected_milliseconds": milliseconds,
                "milliseconds": milliseconds + 0.01,
                "estimated_ap_loss": estimated,
                "measured_ap_loss": measured,
                "ap": 0.6 - measured,
                "layers": 9,
                "layers_not_as_planned": [],
                "is_chosen": name == "front",
            }
            for name, units, milliseconds, estimated, measured in figures
        ],
    }


def sample_data() -> ReportData:
    boxes = [[10, 10, 60, 70, 0.9, 0], [30, 20, 150, 110, 0.4, 1]]
    truth = DetectionView("ground truth", [[12, 9, 61, 72, None, 0]], [], [[[12, 9, 61, 9, 61, 72]]])
    views = [
        truth,
        *(DetectionView(name, boxes, [False, True]) for name in ("float", "engine:openvino:int8")),
    ]
    return ReportData(
        experiment="sample",
        weights="weights.pt",
        image_size=320,
        rows=sample_rows(),
        versions={"torch": "2.15.0", EVIL: "1"},
        machine={"cpu": "two cores", "gpu": None},
        stages=[{"name": "float", "seconds": 12.5}, {"name": "finetune", "seconds": 130.0}],
        curves=[*curves("train", 0), *curves("finetune", 4)],
        detections=[DetectionPanel(EVIL, jpeg(1), (120, 160), views, "2 boxes differ")],
        class_names=["cell", EVIL],
        build={"version": "0.1.0", "commit": EVIL},
        commands=[
            {"title": "Make this run again", "command": f"python train_qat.py '{EVIL}'", "remark": "soon"}
        ],
        configuration={"seed": 3, "stages": ["float"], "data.root": EVIL},
        changed=["seed"],
        hashes={"file of weights": "ab" * 32},
        sensitivity=[{"unit": f"backbone.block{n}", "score": 1.0 / n} for n in range(1, 60)]
        + [{"unit": EVIL, "score": 0.001}],
        placement=[
            {
                "name": f"tensor{n}",
                "kind": "activation" if n % 2 else "weight",
                "bits": 8,
                "scale": 0.01 * (n + 1),
            }
            for n in range(80)
        ]
        + [{"name": "backbone.block1", "kind": "activation", "bits": 8, "layers": ["layer10"]}]
        + [{"name": "head.dfl", "kind": "float", "reason": "narrow"}],
        calibration={"images": [8, 16, 32], "largest": [0.4, 0.03, 0.0], "median": [0.1, 0.01, 0.0]},
        model={
            "parameters": 5128,
            "macs": 4_000_000,
            "strides": [8, 16],
            "shares": {"INT8": 0.75, "float": 0.25},
            "layers": [
                {
                    "name": EVIL if n == 25 else f"layer{n}",
                    "kind": "Conv2d",
                    "parameters": 10 * n + 1,
                    "macs": 100_000 if n < 20 else 200_000,
                    "output": [16, 40, 40],
                    "precision": "float" if n < 10 else "INT8",
                }
                for n in range(30)
            ],
        },
        graph=sample_graph(),
        histograms=sample_histograms(),
        autotune=sample_autotune(),
        activation=sample_activation(),
        findings=[{"name": "Conv_3", "hazard": "float conv & slow", "remedy": "quantize <it>"}],
        notes=["A note with <b>markup</b>."],
        chosen={"engine:openvino:int8": "Chosen on the images that it is reported on."},
    )


def sample_activation() -> dict[str, Any]:
    """Three activations, of which the second was chosen; one could not be measured in accuracy."""
    figures = [("silu", 0.61, 12.0, False), ("relu", None, 9.0, False), ("hardswish", 0.6023, 10.125, True)]
    return {
        "measure": "AP",
        "subject": EVIL,
        "batch": 2,
        "max_loss": 0.03,
        "min_time_saved": 0.05,
        "candidates": [
            {"activation": name, "ap": ap, "milliseconds": milliseconds, "is_chosen": is_chosen}
            for name, ap, milliseconds, is_chosen in figures
        ],
    }


def sample_histograms() -> list[dict[str, Any]]:
    """One layer with eight-bit inputs and four-bit weights, which fine-tuning has moved."""
    shares = [0.1, 0.0, 0.5, 0.4]
    inputs = {"grid": "INT8", "low": -128, "high": 127, "edges": [-160, -80, 0, 80, 160], "before": shares}
    weights = {
        "grid": "INT4",
        "low": -7,
        "high": 7,
        "edges": [-9, -4, 0, 4, 9],
        "before": shares,
        "after": shares[::-1],
    }
    return [{"layer": EVIL, "group": "stem", "weights": weights, "inputs": inputs}]


def sample_graph() -> dict[str, Any]:
    """A chain of 40 convolutions with activations; every second layer reads one group, one name is hostile."""
    nodes: list[dict[str, Any]] = []
    groups = []
    for number in range(40):
        name = EVIL if number == 30 else f"backbone.block{number}"
        before = [len(nodes) - 1] if nodes else []
        precision = "fp32" if number % 5 == 4 else "int8"
        nodes.append({"name": f"{name}.conv", "operator": "Conv", "precision": precision, "sources": before})
        nodes.append(
            {"name": f"{name}.act", "operator": "Relu", "precision": "fp32", "sources": [len(nodes) - 1]}
        )
        groups.append(
            {
                "name": f"{name}.act",
                "tensors": [f"{name}.act"],
                "layers": [f"backbone.block{number + 1}.conv"],
            }
        )
    return {"file": "model.onnx", "nodes": nodes, "groups": groups}
