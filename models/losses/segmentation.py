"""The loss of an instance segmentation head: the detection loss, and a mask term on the same assigned points.

Shapes: B batch, A anchor points, M objects per image (padded), T objects, P prototypes, N positive points, h and w
cells of the prototypes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.processes import sum_over_processes
from models.heads import REG_MAX
from models.losses.detection import DetectionLoss
from models.segmentation import RawSegmentation, detection_maps

DEFAULT_MASK_GAIN = 6.125  # arXiv:1904.02689, section 3.3


@dataclass(frozen=True)
class SegmentTargets:
    """Targets of a segmentation network.

    Attributes:
        boxes: [T, 6]: batch index, class, x1, y1, x2, y2 in input pixels; T may be 0.
        masks: uint8 [T, h, w] on the prototypes' grid, the share of each cell that the object covers, 0 to 255.
    """

    boxes: Tensor
    masks: Tensor


class SegmentationLoss(DetectionLoss):
    """`DetectionLoss` and the term `mask`.

    A positive point's mask is assembled from its coefficients and its image's prototypes (arXiv:1904.02689, eq. 1) and
    compared by binary cross-entropy with its object's mask, inside the object's box only, divided by the box's area so
    that small objects count like large ones (section 3.3). Points are averaged as in the `box` term: weighted by their
    target score, over the sum of all target scores.

    Args:
        num_classes: K.
        strides: Input pixels per cell for each level, fine to coarse.
        reg_max: R, bins per box side.
        gains: Factors of `mask` (default 6.125) and of the detection terms.
        top_k: Points per object in the assigner; 1 for a one-to-one head.

    Raises:
        ValueError: For a gain of another name.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int],
        reg_max: int = REG_MAX,
        gains: Mapping[str, float] | None = None,
        top_k: int = 10,
    ) -> None:
        detection_gains = {name: gain for name, gain in (gains or {}).items() if name != "mask"}
        super().__init__(num_classes, strides, reg_max, detection_gains, top_k)
        self.gains["mask"] = (gains or {}).get("mask", DEFAULT_MASK_GAIN)

    def forward(  # type: ignore[override]
        self, raw: RawSegmentation, targets: SegmentTargets, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Compute the four terms in float32, for any autocast state; the total loss is their sum.

        Args:
            raw: Per level (box, cls, coefficients [B, P, ...]) maps, and prototypes [B, P, h, w].
            targets: Objects and their masks.
            image_size: (height, width) of the input in pixels.

        Raises:
            ValueError: As for `DetectionLoss`, or the masks are not on the prototypes' grid.
        """
        maps, prototypes = detection_maps(raw), raw[1]
        self._check(maps, targets.boxes, image_size)
        expected = (targets.boxes.shape[0], *prototypes.shape[2:])
        if tuple(targets.masks.shape) != expected:
            raise ValueError(
                f"Target masks have shape {tuple(targets.masks.shape)}; expected {expected}: one per object, on the "
                "prototypes' grid"
            )
        device = prototypes.device
        with torch.autocast(device.type, enabled=False):
            boxes_T6 = targets.boxes.to(device=device, dtype=torch.float32)
            terms, assignment = self._terms(maps, boxes_T6)
            image_N, anchor_N = assignment.positive_BA.nonzero(as_tuple=True)
            coefficients_BPA = torch.cat([level[2].flatten(2) for level in raw[0]], dim=2).float()
            rows_BM = target_rows(boxes_T6[:, 0].long(), prototypes.shape[0])
            object_N = rows_BM[image_N, assignment.objects_BA[image_N, anchor_N]]
            per_point_N = mask_losses(
                prototypes.float(),
                coefficients_BPA[image_N, :, anchor_N],
                image_N,
                targets.masks.to(device)[object_N],
                assignment.boxes_BA4[image_N, anchor_N],
                image_size,
            )
            weight_N = assignment.scores_BAK.sum(dim=-1)[image_N, anchor_N]
            total = sum_over_processes(assignment.scores_BAK.sum()).clamp(min=1.0)
            terms["mask"] = (per_point_N * weight_N).sum() / total * self.gains["mask"]
        return terms


def target_rows(image_T: Tensor, batch_size: int) -> Tensor:
    """Row of each image's objects in the flat list, [B, M], in the order of `pad_targets`; -1 if there is none."""
    counts = torch.bincount(image_T, minlength=batch_size)
    most = int(counts.max()) if image_T.numel() else 0
    order = torch.argsort(image_T, stable=True)
    first = counts.cumsum(0) - counts
    slot = torch.arange(image_T.numel(), device=image_T.device) - first[image_T[order]]
    rows_BM = image_T.new_full((batch_size, most), -1)
    rows_BM[image_T[order], slot] = order
    return rows_BM


def mask_losses(
    prototypes_BPhw: Tensor,
    coefficients_NP: Tensor,
    image_N: Tensor,
    masks_Nhw: Tensor,
    boxes_N4: Tensor,
    image_size: tuple[int, int],
) -> Tensor:
    """Mask loss of every positive point: mean binary cross-entropy inside its object's box.

    Cells count by the share of them that the box covers, so that the area is exact for boxes of any size.

    Args:
        prototypes_BPhw: Prototypes.
        coefficients_NP: Predicted coefficients.
        image_N: Image of each point, rising.
        masks_Nhw: uint8, the wanted mask of each point.
        boxes_N4: Its object's box, xyxy, input pixels.
        image_size: (height, width) of the input in pixels.

    Returns:
        [N].
    """
    h, w = prototypes_BPhw.shape[2:]
    losses = []
    for image in range(prototypes_BPhw.shape[0]):  # images in turn: masks of one image share its prototypes
        chosen = image_N == image
        logits = (coefficients_NP[chosen] @ prototypes_BPhw[image].flatten(1)).unflatten(1, (h, w))
        wanted = masks_Nhw[chosen].float() / 255
        cells = (
            boxes_N4[chosen] * boxes_N4.new_tensor([w, h, w, h]) / boxes_N4.new_tensor(image_size[::-1] * 2)
        )
        inside = _covered(cells[:, 1::2], h)[:, :, None] * _covered(cells[:, 0::2], w)[:, None, :]
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        losses.append((entropy * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1e-6))
    return torch.cat(losses)


def _covered(ends_N2: Tensor, count: int) -> Tensor:
    """Share of each of `count` unit cells between two ends, [N, count]; ends 1.5 and 3 give 0, 0.5, 1, 0, ..."""
    start = torch.arange(count, device=ends_N2.device, dtype=ends_N2.dtype)
    upper = torch.minimum(ends_N2[:, 1:], start + 1)
    return (upper - torch.maximum(ends_N2[:, :1], start)).clamp(min=0)
