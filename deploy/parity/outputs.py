"""Engine against torch on the same images, before the engine is used.

Both boxes and scores are compared: known miscompiles corrupt the boxes while class scores still agree to
1e-4.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from core.errors import DeployError
from deploy.runtimes.base import FloatArray


@dataclass(frozen=True)
class CompareReport:
    """Differences between an engine's decoded output and a reference, over all images and anchors.

    Attributes:
        images: number of images.
        box_max_px, box_mean_px: absolute difference of (cx, cy, w, h), input pixels, all anchors.
        box_max_px_confident, box_mean_px_confident: largest coordinate difference of an anchor, and its mean, over
            anchors whose best reference score is at least `confident_score`.
        confident_anchors: how many such anchors there are.
        confident_score: the threshold.
        score_max, score_mean: absolute difference of class scores, all anchors.
    """

    images: int
    box_max_px: float
    box_mean_px: float
    box_max_px_confident: float
    box_mean_px_confident: float
    confident_anchors: int
    confident_score: float
    score_max: float
    score_mean: float

    def as_dict(self) -> dict[str, object]:
        """Plain dict, ready for JSON."""
        return asdict(self)

    def require(
        self,
        box_px: float = math.inf,
        score: float = math.inf,
        mean_box_px: float = math.inf,
        mean_score: float = math.inf,
    ) -> None:
        """Raise DeployError unless the differences stay within every limit.

        For INT8 engines the means tell a broken graph from arithmetic: one rounding that falls the other way can move
        single anchors far, in a sound engine too.

        Args:
            box_px: largest box difference at confident anchors, input pixels.
            score: largest score difference over all anchors.
            mean_box_px: mean box difference at confident anchors, input pixels.
            mean_score: mean score difference over all anchors.
        """
        figures = (
            ("largest box difference [px]", self.box_max_px_confident, box_px),
            ("mean box difference [px]", self.box_mean_px_confident, mean_box_px),
            ("largest score difference", self.score_max, score),
            ("mean score difference", self.score_mean, mean_score),
        )
        missed = [f"{name} {value:.6g} (limit {limit:g})" for name, value, limit in figures if value > limit]
        if missed:
            raise DeployError(
                f"The engine disagrees with torch on {self.images} images, boxes compared at {self.confident_anchors} "
                f"confident anchors: {', '.join(missed)}. Do not use it: rebuild, try another runtime version or "
                "precision, and compare again."
            )


def unexplained_variance(output: FloatArray, reference: FloatArray, label: str = "output") -> float:
    """Mean squared difference over the variance of the reference: 0 for equal arrays, 1 for a constant answer.

    Raises:
        DeployError: shapes differ, or the output holds values that are not finite.
    """
    if output.shape != reference.shape:
        raise DeployError(f"{label} has shape {output.shape}, the reference {reference.shape}.")
    if not np.isfinite(output).all():
        raise DeployError(f"{label} has values that are not finite; rebuild in another precision.")
    difference = output.astype(np.float64) - reference.astype(np.float64)
    return float(np.square(difference).mean() / max(float(reference.astype(np.float64).var()), 1e-12))


def compare_arrays(
    output: FloatArray, reference: FloatArray, confident_score: float = 0.25, label: str = "output"
) -> CompareReport:
    """Compare two decoded outputs [N, 4 + K, A].

    Args:
        output: of the engine.
        reference: of the model that was exported, on the same images.
        confident_score: see `CompareReport`.
        label: what `output` is, for messages.

    Raises:
        DeployError: shapes differ, or the engine returns values that are not finite.
    """
    if output.shape != reference.shape or output.ndim != 3 or output.shape[1] < 5:
        raise DeployError(
            f"{label} has shape {output.shape}, the reference {reference.shape}; both should be [N, 4 + K, "
            "A]."
        )
    bad = int(np.count_nonzero(~np.isfinite(output)))
    if bad:
        raise DeployError(
            f"{label} holds {bad} values that are not finite; do not use it: rebuild in another precision."
        )
    difference = np.abs(output.astype(np.float64) - reference.astype(np.float64))
    boxes, scores = difference[:, :4], difference[:, 4:]
    confident = reference[:, 4:].max(axis=1) >= confident_score  # [N, A]
    at_confident = boxes.max(axis=1)[confident]
    return CompareReport(
        images=len(output),
        box_max_px=float(boxes.max()),
        box_mean_px=float(boxes.mean()),
        box_max_px_confident=float(at_confident.max()) if at_confident.size else 0.0,
        box_mean_px_confident=float(at_confident.mean()) if at_confident.size else 0.0,
        confident_anchors=int(confident.sum()),
        confident_score=confident_score,
        score_max=float(scores.max()),
        score_mean=float(scores.mean()),
    )
