"""Settings of the sections evaluate and metric: what every row is measured by; a part of `configs.schema`."""

from __future__ import annotations

from dataclasses import dataclass

from configs.setting import setting
from core.choices import LAYOUTS


@dataclass
class EvaluateConfig:
    """Detection and COCO metrics, the same for torch and for every engine."""

    confidence: float = setting(0.001, "Lowest class score kept", unit="0..1", minimum=0, maximum=1)
    user_confidence: float = setting(
        0.25,
        "Score above which detections are used; precision, recall and agreement with float are measured there, or at "
        "evaluate.confidence if that is higher",
        unit="0..1",
        minimum=0,
        maximum=1,
    )
    iou: float = setting(0.7, "Class-wise NMS threshold", unit="IoU, 0..1", above=0, maximum=1)
    max_detections: int = setting(300, "Boxes kept per image", unit="boxes", minimum=1, maximum=100_000)
    batch_size: int = setting(8, "Images per evaluation step", unit="images", minimum=1, maximum=65536)
    layout: str = setting(
        "auto",
        "Memory layout of images and activations wherever PyTorch runs without training: rows, calibration, "
        "sensitivity; auto measures which is faster, once per machine and network",
        choices=("auto", *LAYOUTS),
    )
    engine: str = setting(
        "hotcoco", "Metric implementation: fast, or the reference", choices=("hotcoco", "pycocotools")
    )

    @property
    def operating_confidence(self) -> float:
        """Threshold of the operating point: detections with lower scores than `confidence` are not there."""
        return max(self.user_confidence, self.confidence)


@dataclass
class MetricConfig:
    """Your own measure instead of COCO AP."""

    factory: str | None = setting(
        None,
        "path/to/file.py:function or package.module:function, from (predict, batches) to a number, higher is better, "
        "that rows, best epoch and gates then use; see docs/custom.md",
    )
