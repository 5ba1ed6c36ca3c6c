"""What engines give, as detections: one reader for every form of output that `deploy.targets.outputs` names.

decoded and raw go through this project's own decode and NMS (heads that give each object one box: no NMS), with the
thresholds of the evaluation. onnx_nms and efficient_nms come with their NMS done in the graph, by the thresholds
written there, and end2end with its detections chosen; they are only sorted and cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from core.errors import DeployError, OctetError
from data import Found, Instances, Predict
from deploy.runtimes.base import FloatArray, Runtime
from models import Decode, pairwise_iou, soft_masks
from pipeline.evaluation.suppression import suppress_overlaps

RAW_NAME = re.compile(r"box_(\d+)")


@dataclass(frozen=True)
class OutputReader:
    """Outputs of an engine to detections.

    Attributes:
        form: "decoded", "raw", "end2end", "onnx_nms" or "efficient_nms"; see `deploy.targets.outputs`.
        confidence: scores must be greater, 0..1.
        iou: threshold of the NMS that runs here (decoded, raw); None for a head that needs none.
        max_detections: boxes kept in an image.
        masks: whether coefficients follow the scores, and a second output holds the prototypes (decoded).
    """

    form: str
    confidence: float
    iou: float | None
    max_detections: int
    masks: bool = False

    @property
    def is_decodable(self) -> bool:
        """Whether boxes and scores of every anchor can be had, not only detections."""
        return self.form in ("decoded", "raw")

    def decoded(self, outputs: Mapping[str, FloatArray]) -> Tensor:
        """Boxes and scores of every anchor, float32 [B, 4 + K, A].

        Raises:
            DeployError: the outputs are not of this form.
        """
        if self.form == "raw":
            return decode_maps(outputs)
        (first, *_) = outputs.values()
        if first.ndim != 3 or first.shape[1] < 5:
            raise DeployError(
                f"The engine's first output has the shape {first.shape}; expected [B, 4 + classes, anchors]. Export it "
                "with deploy.outputs=decoded."
            )
        return torch.from_numpy(first)

    def num_classes(self, outputs: Mapping[str, FloatArray]) -> int:
        """Classes that the outputs tell apart (decoded, raw); raises DeployError where they are not of this form."""
        rows = self.decoded(outputs).shape[1] - 4
        return rows - len(self._prototypes(outputs)[0]) if self.masks else rows

    def detections(self, outputs: Mapping[str, FloatArray], images: int) -> Sequence[Found]:
        """Detections of the first `images` images of a batch, by falling score.

        Returns:
            For each image [N, 6]: x1, y1, x2, y2 in input pixels, score, class; with `masks` as `Instances`.

        Raises:
            DeployError: the outputs are not of this form.
        """
        try:
            return self._detections(outputs, images)
        except OctetError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in outputs.items())
            raise DeployError(
                f"The engine gives {shapes}, which is not the form '{self.form}' that its file states ({error}); "
                "export it again."
            ) from error

    def _detections(self, outputs: Mapping[str, FloatArray], images: int) -> Sequence[Found]:
        if not self.masks:
            return self.boxes(outputs, images)
        if self.form == "end2end":
            maps = self._prototypes(outputs)[:images]
            return [
                Instances(rows[:, :6], soft_masks(prototypes, rows[:, 6:]))
                for rows, prototypes in zip(self.boxes(outputs, images), maps, strict=True)
            ]
        decoded = self.decoded(outputs)[:images], self._prototypes(outputs)[:images]
        return suppress_overlaps(decoded, self.confidence, self.iou, self.max_detections)

    def boxes(self, outputs: Mapping[str, FloatArray], images: int) -> list[Tensor]:
        """`detections` of a network without masks; of one with masks (end2end) followed by its coefficients."""
        if self.is_decodable:
            decoded = self.decoded(outputs)[:images]
            return [
                one.detections if isinstance(one, Instances) else one
                for one in suppress_overlaps(decoded, self.confidence, self.iou, self.max_detections)
            ]
        if self.form == "end2end":
            per_image = _of_end_to_end(outputs)
        else:
            per_image = _of_plugin(outputs) if self.form == "efficient_nms" else _of_onnx(outputs, images)
        return [self._cut(found) for found in per_image[:images]]

    def predictor(self, engine: Runtime, batch: int) -> Predict:
        """Float images of at most `batch` to detections; a smaller batch is filled up with black images."""

        def predict(images: Tensor) -> Sequence[Found]:
            array = images.cpu().numpy()
            missing = batch - len(array)
            if missing > 0:
                array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), np.float32)])
            return self.detections(engine.infer_outputs(array), len(images))

        return predict

    def _prototypes(self, outputs: Mapping[str, FloatArray]) -> Tensor:
        second = next((array for index, array in enumerate(outputs.values()) if index == 1), None)
        if second is None or second.ndim != 4:
            shapes = ", ".join(str(array.shape) for array in outputs.values())
            raise DeployError(
                f"The engine gives {shapes}; a segmentation network gives [B, 4 + classes + prototypes, anchors] and "
                "[B, prototypes, height, width]."
            )
        return torch.from_numpy(second)

    def _cut(self, found: Tensor) -> Tensor:
        found = found[found[:, 4] > self.confidence]
        order = found[:, 4].argsort(descending=True, stable=True)
        return found[order[: self.max_detections]]


def decode_maps(outputs: Mapping[str, FloatArray]) -> Tensor:
    """Raw level maps box_8, class_8, box_16 ... [B, 4R or K, h, w] to decoded boxes [B, 4 + K, A].

    Raises:
        DeployError: other names, or a class map without its box map.
    """
    strides = sorted(int(found[1]) for name in outputs if (found := RAW_NAME.fullmatch(name)))
    wanted = {f"{kind}_{stride}" for stride in strides for kind in ("box", "class")}
    if not strides or wanted != set(outputs):
        raise DeployError(
            f"The engine gives {', '.join(outputs)}; raw outputs are called box_8, class_8, box_16 and so on."
        )
    maps = [[torch.from_numpy(outputs[f"{kind}_{s}"]) for kind in ("box", "class")] for s in strides]
    decode = Decode(strides, maps[0][0].shape[1] // 4)
    return cast(Tensor, decode(tuple((box, score) for box, score in maps)))


def _of_end_to_end(outputs: Mapping[str, FloatArray]) -> list[Tensor]:
    (first, *_) = outputs.values()
    if first.ndim != 3 or first.shape[2] < 6:
        raise DeployError(
            f"The engine's first output has the shape {first.shape}; expected [B, detections, 6]. Export it with "
            "deploy.outputs=end2end."
        )
    return list(torch.from_numpy(first))


def _of_onnx(outputs: Mapping[str, FloatArray], images: int) -> list[Tensor]:
    rows = torch.from_numpy(outputs["detections"])  # [N, 7]: image, x1, y1, x2, y2, score, class
    return [rows[rows[:, 0] == index, 1:] for index in range(images)]


def _of_plugin(outputs: Mapping[str, FloatArray]) -> list[Tensor]:
    names = ("num_dets", "det_boxes", "det_scores", "det_classes")
    counts, boxes, scores, classes = (torch.from_numpy(outputs[name]).float() for name in names)
    rows = torch.cat((boxes, scores[..., None], classes[..., None]), dim=2)
    return [image[: int(count)] for image, count in zip(rows, counts.flatten(), strict=True)]


def match_detections(found: Tensor, reference: Tensor, iou: float = 0.5) -> list[tuple[int, int]]:
    """Pairs (index in `found`, index in `reference`) of one class that overlap by at least `iou`, one to one.

    The most confident detection chooses first, the partner that it overlaps most.

    Args:
        found: [N, 6] x1, y1, x2, y2, score, class.
        reference: [M, 6], the same.
        iou: 0..1.
    """
    overlap = pairwise_iou(found[:, :4], reference[:, :4])
    overlap[found[:, 5, None] != reference[None, :, 5]] = 0
    pairs = []
    for index in found[:, 4].argsort(descending=True, stable=True).tolist():
        if not len(reference):
            break
        best = int(overlap[index].argmax())
        if overlap[index, best] >= iou:
            pairs.append((index, best))
            overlap[:, best] = 0
    return pairs
