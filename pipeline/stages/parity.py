"""Every engine is compared with torch on real images before it is used; a mismatch stops with figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from core.choices import QUANTIZED
from core.errors import DeployError
from data import to_input
from deploy import CompareReport, Runtime, compare_arrays, unexplained_variance
from deploy.runtimes.base import FloatArray
from pipeline.evaluation.engine_outputs import OutputReader, match_detections
from pipeline.evaluation.suppression import is_nms_free
from pipeline.job import Job
from pipeline.run.progress import say

PARITY_IMAGES = 8
MASK_LIMITS = {True: 0.1, False: 1e-5}  # unexplained variance, by whether the engine is not exact
CLEAR_MARGIN = 0.1  # score above the threshold at which a detection cannot be missed by arithmetic alone
MISSED_SHARE = {True: 0.2, False: 0.02}  # of the clear detections, by whether the engine is quantized


def engine_row(engine: Runtime) -> str:
    """Row name of an engine."""
    return f"engine:{engine.name}:{engine.precision}"


def reader_of(job: Job) -> OutputReader:
    """How this run's engines are read, with the thresholds of the evaluation."""
    config = job.config.evaluate
    form, masks = job.config.deploy.outputs, job.splits.task == "segment"
    iou = None if is_nms_free(job.networks.detector.decode) else config.iou
    return OutputReader(form, config.confidence, iou, config.max_detections, masks)


def check_parity(job: Job, engine: Runtime) -> dict[str, object]:
    """Compare an engine with torch on real validation images.

    Rounding that falls the other way in one layer moves INT8 results by whole grid steps, so the limits for INT8
    are those of a broken graph, not of arithmetic (one was seen at 75 px and a mean score difference of 0.014, sound
    ones stay below 0.0005); the accuracy rows tell the rest. Engines with NMS in the graph are compared by detections.

    Raises:
        DeployError: they disagree; the message has the figures.
    """
    quantized = engine.precision in QUANTIZED
    network: nn.Module = job.networks.best()[0] if quantized else job.networks.detector.network
    batch = job.config.deploy.batch
    images: list[Tensor] = []
    decoded: list[Tensor] = []
    prototypes: list[Tensor] = []
    with torch.inference_mode():
        for loaded in job.splits.letterboxed(job.splits.val, batch, max(PARITY_IMAGES, batch)):
            if len(loaded.images) == batch:
                images.append(to_input(loaded.images, job.device))
                answer = job.networks.detector.decode(network(images[-1]))
                if job.splits.task == "segment":
                    answer, maps = answer
                    prototypes.append(maps.cpu())
                decoded.append(answer.cpu())
    if not images:
        raise DeployError(f"deploy.batch={batch} is larger than the validation split")
    results = [engine.infer_outputs(image.cpu().numpy()) for image in images]
    reader, name = reader_of(job), f"{engine.name} engine {engine.path.name}"
    if not reader.is_decodable:
        nms = job.config.deploy.nms
        in_graph = OutputReader("decoded", nms.confidence, nms.iou, nms.max_detections)
        if reader.form == "end2end":
            in_graph = replace(reader, form="decoded", max_detections=nms.max_detections)
        found = [one for output in results for one in reader.boxes(output, batch)]
        wanted = [one for d in decoded for one in in_graph.boxes({"output0": d.numpy()}, batch)]
        agreement = compare_detections(found, wanted, nms.confidence)
        say(f"parity {engine_row(engine)} {engine.path.name}: {agreement.describe()}")
        agreement.require(MISSED_SHARE[quantized], name)
        return asdict(agreement)
    output = np.concatenate([reader.decoded(result).numpy() for result in results])
    reference, rows = torch.cat(decoded).numpy(), 4 + job.networks.detector.num_classes
    report = compare_arrays(output[:, :rows], reference[:, :rows], label=name)
    say(f"parity {engine_row(engine)} {engine.path.name}: {describe(report)}")
    if engine.precision == "fp32":
        report.require(box_px=0.05, score=0.001)
    else:
        report.require(mean_box_px=4.0, mean_score=0.005)
    if job.splits.task != "segment":
        return report.as_dict()
    maps_found = np.concatenate([result[engine.output_names[1]] for result in results])
    pairs = {
        "coefficients": (output[:, rows:], reference[:, rows:]),
        "prototypes": (maps_found, torch.cat(prototypes).numpy()),
    }
    return report.as_dict() | check_masks(engine, pairs)


def check_masks(engine: Runtime, pairs: dict[str, tuple[FloatArray, FloatArray]]) -> dict[str, float]:
    """Compare what masks are made of, as unexplained variance of torch's coefficients and prototypes.

    Raises:
        DeployError: they disagree by more than float arithmetic, or INT8 rounding, explains.
    """
    errors = {name: unexplained_variance(found, wanted, name) for name, (found, wanted) in pairs.items()}
    say(f"parity {engine_row(engine)}: " + ", ".join(f"{name} {error:.2g}" for name, error in errors.items()))
    limit = MASK_LIMITS[engine.precision != "fp32"]
    if max(errors.values()) > limit:
        raise DeployError(
            f"The masks of {engine.name} engine {engine.path.name} disagree with torch: unexplained variance {errors}, "
            f"limit {limit}. Do not use it: rebuild, or try another runtime version or precision."
        )
    return errors


def describe(report: CompareReport) -> str:
    """The figures in one line, for the log."""
    return (
        f"boxes within {report.box_max_px_confident:.3f} px at {report.confident_anchors} confident anchors, scores "
        f"within {report.score_max:.4f} (mean {report.score_mean:.6f})"
    )


@dataclass(frozen=True)
class Agreement:
    """Detections of an engine compared with those of torch.

    Attributes:
        images: number of images.
        detections, reference_detections: of the engine, of torch.
        matched: pairs of one class with an IoU of at least 0.5.
        clear: detections of either side whose score is well above the threshold.
        clear_missed: those of them that the other side does not have.
    """

    images: int
    detections: int
    reference_detections: int
    matched: int
    clear: int
    clear_missed: int

    def describe(self) -> str:
        """The figures in one line, for the log."""
        return (
            f"{self.matched} of torch's {self.reference_detections} detections are among the engine's "
            f"{self.detections}; of {self.clear} clear ones {self.clear_missed} are missing on one side"
        )

    def require(self, share: float, name: str) -> None:
        """Raise DeployError where more than one, and more than this share, of the clear detections is missing."""
        if self.clear_missed > max(1, share * self.clear):
            raise DeployError(
                f"{name} disagrees with torch on {self.images} images: {self.describe()} (limit {share:.0%}). Do not "
                "use it: rebuild, try another runtime version or deploy.outputs=decoded, and compare again."
            )


def compare_detections(found: list[Tensor], wanted: list[Tensor], confidence: float) -> Agreement:
    """Compare detections [N, 6] image by image; `confidence` is the threshold both went through."""
    matched = clear = missed = 0
    for one, other in zip(found, wanted, strict=True):
        pairs = match_detections(one, other)
        matched += len(pairs)
        for side, partners in ((one, {a for a, _ in pairs}), (other, {b for _, b in pairs})):
            sure = [i for i, score in enumerate(side[:, 4].tolist()) if score >= confidence + CLEAR_MARGIN]
            clear += len(sure)
            missed += sum(index not in partners for index in sure)
    sizes = [sum(len(one) for one in side) for side in (found, wanted)]
    return Agreement(len(found), sizes[0], sizes[1], matched, clear, missed)
