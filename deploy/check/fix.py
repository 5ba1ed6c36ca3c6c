"""Fixing Q/DQ graphs of any tool: what can be put right without data, and what cannot.

Each fix answers the findings of some rules with a graph pass. A fix runs only where one of its rules has findings, and
is taken back where the graph would have more findings than before. Some fixes change values (a larger scale for tensors
that meet, a rounding less): `compare_files` shows by how much on images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from core.errors import DataError, DeployError
from core.names import listing
from core.pictures import check_picture
from deploy.check import fix_passes
from deploy.check.report import CheckReport, inspect_model
from deploy.graph.known import inlined, qualify_operators, restore_operators
from deploy.graph.model import load_onnx, save_onnx
from deploy.graph.passes import GraphPass, drop_identities, merge_identical, run_pass
from deploy.graph.view import View
from deploy.parity.outputs import compare_arrays
from deploy.runtimes.base import FloatArray
from deploy.runtimes.onnxruntime import ONNXRuntime
from deploy.targets.resize import quantize_behind_resize

MAX_IMAGES = 8  # of a folder or an .npz file that are compared
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Fix:
    """A pass, the rules whose findings it answers, and what it does."""

    rules: tuple[str, ...]
    graph_pass: GraphPass
    description: str


FIXES = (
    Fix(
        ("quantized-bias", "zero-point"),
        fix_passes.float_constants,
        "biases and other constants except weights written as float values (same values)",
    ),
    Fix(("dangling-q",), fix_passes.drop_unread, "unread nodes removed (same values)"),
    Fix(
        ("q-at-output", "q-in-decode", "useless-q"),
        fix_passes.needless_pairs,
        "pairs removed that are read by float operators only",
    ),
    Fix(
        ("zero-point",),
        fix_passes.symmetric_activations,
        "activations on int8 codes with zero point 0 over the same range",
    ),
    Fix(("scale-shape",), fix_passes.scalar_scales, "activation scales stored as scalars (same values)"),
    Fix(
        ("q-inside-conv",),
        fix_passes.quantizers_behind_activations,
        "pairs between convolution and activation removed, or moved after a ReLU",
    ),
    Fix(
        ("per-tensor-weight",),
        fix_passes.per_channel_weights,
        "float weights quantized per output channel",
    ),
    Fix(
        ("residual",),
        fix_passes.float_branches,
        "residual sums read the branch in float and the skip after Q/DQ",
    ),
    Fix(
        ("unequal-scales", "requantize", "conv-float"),
        fix_passes.equal_scales,
        "tensors that meet get the largest of their scales",
    ),
    Fix(("resize",), quantize_behind_resize, "Q/DQ pairs repeated after nearest Resize (same values)"),
    Fix(("duplicate-q",), merge_identical, "equal Q and DQ of one tensor merged (same values)"),
)
"""In the order in which they run."""

LEFT: Mapping[str, str] = {
    "per-tensor-weight": "the file holds codes, rounded with one scale; quantize again from the float weights",
    "q-inside-conv": "nothing is quantized after the activation, and the scale before it does not fit there: calibrate",
    "unequal-scales": "they have zero points, differ in type, or belong to codes that other operators read",
    "unknown-operator": "what the check does not support is left unchanged",
    "unknown-codes": "what the check does not support is left unchanged",
    "zero-point": "weights with a zero point or unsigned codes: quantize again from the float weights",
}
"""Why findings of a rule that has a fix can remain."""


@dataclass(frozen=True)
class FixCount:
    """One fix that was made: changes in the number of Q and DQ nodes, edits in all, findings before and after it."""

    description: str
    quantize: int
    dequantize: int
    edits: int
    findings_before: int
    findings_after: int


@dataclass(frozen=True)
class FixReport:
    """What was fixed in a graph.

    Attributes:
        fixes: the fixes that were made, in order; empty where there was nothing to fix.
        taken_back: descriptions of fixes that would have added findings.
        before: the check of the graph as it was.
        after: the check of the fixed graph.
    """

    fixes: tuple[FixCount, ...]
    taken_back: tuple[str, ...]
    before: CheckReport
    after: CheckReport

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; the findings are those that were there before."""
        findings = [finding.as_dict() for finding in self.before.findings]
        return {
            "fixes": [asdict(fix) for fix in self.fixes],
            "taken_back": list(self.taken_back),
            "findings_before": findings,
        }


def fix_file(
    path: Path, out: Path, image_size: tuple[int, int] | None = None, target: str | None = None
) -> FixReport:
    """Fix an ONNX file and write the result; where there is nothing to fix, the same graph.

    Args:
        path: the file; it is treated as untrusted data.
        out: the file to write, whole or not at all; external data of the input is stored inside it.
        image_size: (height, width), for graphs that leave it open.
        target: engine the graph is for; None takes what the file says, TensorRT where it says nothing.

    Raises:
        DeployError: the file cannot be read or is also the one to write.
        WriteError: the result cannot be written.
    """
    if out.resolve() == path.resolve():
        raise DeployError(f"--fix {out} would overwrite the graph that is checked; choose another file.")
    model, report = fix_model(load_onnx(path), str(path), image_size, target)
    save_onnx(model, out)
    return report


def fix_model(
    model: ModelProto,
    path: str = "",
    image_size: tuple[int, int] | None = None,
    target: str | None = None,
) -> tuple[ModelProto, FixReport]:
    """Fix a copy of a model; returns the model itself where there is nothing to fix."""
    before = current = inspect_model(model, path, image_size, target)
    mended, fixes, taken_back = model, [], []
    for fix in FIXES:
        if not any(finding.rule in fix.rules for finding in current.findings):
            continue
        candidate = ModelProto()
        candidate.CopyFrom(inlined(mended))
        qualify_operators(candidate.graph)
        run_pass(candidate, drop_identities)
        count = run_pass(candidate, fix.graph_pass)
        if not count.edits:
            continue
        restore_operators(candidate.graph)
        report = inspect_model(candidate, path, image_size, target)
        if len(report.findings) > len(current.findings):
            taken_back.append(fix.description)
            continue
        fixes.append(
            FixCount(
                fix.description,
                count.quantize_after - count.quantize_before,
                count.dequantize_after - count.dequantize_before,
                count.edits,
                len(current.findings),
                len(report.findings),
            )
        )
        mended, current = candidate, report
    return mended, FixReport(tuple(fixes), tuple(taken_back), before, current)


def format_fixes(report: FixReport, out: Path) -> str:
    """What was fixed and what was not, as text."""
    counts = Counter(finding.rule for finding in report.before.findings)
    listed = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    lines = [
        f"{report.before.path}: {len(report.before.findings)} findings" + (f": {listed}" if listed else "")
    ]
    for fix in report.fixes:
        lines.append(
            f"  {fix.description}: {fix.edits} edits, {fix.quantize:+d} Q, {fix.dequantize:+d} DQ; "
            f"findings {fix.findings_before} -> {fix.findings_after}"
        )
    lines += [f"  not applied, it would add findings: {description}" for description in report.taken_back]
    if not report.fixes:
        lines.append(f"  nothing to fix without data: {out} holds the same graph")
    remaining = Counter(finding.rule for finding in report.after.findings)
    fixable = {rule for fix in FIXES for rule in fix.rules}
    for rule, number in remaining.most_common():
        reason = LEFT.get(rule, "see below" if rule in fixable else "no fix without data or the float model")
        lines.append(f"  left: {rule} {number} ({reason})")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- outputs before and after
def compare_files(before: Path, after: Path, images: Path, image_size: tuple[int, int] | None = None) -> str:
    """Outputs of two graphs on images, computed literally by ONNX Runtime, as text.

    Args:
        before: ONNX file.
        after: ONNX file with the same inputs and outputs.
        images: a folder of images, which are resized to the graph's input (no letterbox), or an `.npz` file whose first
            array is float32 [N, 3, H, W] in [0, 1]; the first `MAX_IMAGES` are used.
        image_size: (height, width), for graphs that leave it open.

    Raises:
        DeployError: no images, or ONNX Runtime cannot run a graph.
    """
    batch, unread = _read_images(images, image_size or _input_size(before))
    runs = []
    for path in (before, after):
        runtime = ONNXRuntime(path, optimize=False)
        runs.append([runtime.infer_outputs(image[None]) for image in batch])
        runtime.close()
    lines = [f"outputs before and after on {len(batch)} images (ONNX Runtime, no optimizations):"]
    if unread:
        lines.append(f"  not read, since OpenCV does not decode them: {listing(unread, 5)}")
    for name in runs[0][0]:
        old, new = (np.concatenate([result[name] for result in run]) for run in runs)
        if name == "output0" and old.ndim == 3 and 5 <= old.shape[1] < old.shape[2]:  # decoded: [N, 4 + K, A]
            found = compare_arrays(new, old)
            lines.append(
                f"  {name}: boxes max {found.box_max_px:.4g} px, mean {found.box_mean_px:.4g} px, mean "
                f"{found.box_mean_px_confident:.4g} px at {found.confident_anchors} confident anchors; scores max "
                f"{found.score_max:.4g}, mean {found.score_mean:.4g}"
            )
        else:
            difference = np.abs(new.astype(np.float64) - old.astype(np.float64))
            lines.append(f"  {name}: max {difference.max():.4g}, mean {difference.mean():.4g}")
    return "\n".join(lines)


def _input_size(path: Path) -> tuple[int, int] | None:
    view = View(load_onnx(path))
    sizes = view.shapes.get(view.graph.inputs[0], ())[2:]
    return (sizes[0], sizes[1]) if len(sizes) == 2 and sizes[0] and sizes[1] else None


def _read_images(source: Path, size: tuple[int, int] | None) -> tuple[FloatArray, list[str]]:
    """The images, and the names of files that are none."""
    if source.suffix == ".npz" and source.is_file():
        try:
            with np.load(source, allow_pickle=False) as arrays:
                images = arrays[arrays.files[0]][:MAX_IMAGES]
        except (ValueError, OSError, IndexError) as error:
            raise DeployError(f"{source} holds no array that can be read ({error}).") from error
        if images.ndim != 4 or images.dtype != np.float32:
            raise DeployError(
                f"The first array of {source} is {images.dtype} {list(images.shape)}; expected float32 [N, 3, H, W]."
            )
        return images, []
    import cv2

    files = sorted(file for file in source.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)[:MAX_IMAGES]
    read = {file.name: cv2.imread(str(file)) if _is_decodable(file) else None for file in files}
    found, unread = (
        [i for i in read.values() if i is not None],
        [name for name, i in read.items() if i is None],
    )
    if not found:
        broken = f"; OpenCV does not decode {listing(unread, 5)}" if unread else ""
        raise DeployError(f"No images in {source}{broken}; give a folder of images or an .npz file.")
    if size is None:
        raise DeployError("The graph leaves its image size open; give --size HEIGHTxWIDTH.")
    resized = [cv2.resize(image, size[::-1])[:, :, ::-1].transpose(2, 0, 1) for image in found]
    return np.ascontiguousarray(np.stack(resized), np.float32) / np.float32(255), unread


def _is_decodable(file: Path) -> bool:
    """Whether a file's header is that of an image within the limits of `core.pictures`."""
    try:
        check_picture(file)
    except DataError:
        return False
    return True
