"""Anything that detects, with one interface: a run, an engine, an ONNX file, a float checkpoint.

Preprocessing, decode and NMS are those of every row of a report, so what is drawn is what was measured.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.compose import read
from core.choices import ONE2ONE, TORCH
from core.confinement import confine
from core.errors import DataError, DeployError, RunError
from core.image_size import ImageSize
from core.names import listing
from core.runtimes import RUNTIMES
from data import Found, Rle, class_positions, decode_mask, letterbox, to_input, to_picture
from deploy import EngineRequest, Runtime, open_engine
from deploy.runtimes.engines import find_batch, find_image_size, runs_on_cpu, runtime_class, runtime_of
from models import Detector, fold_detector, load_detector, select_head
from pipeline.class_names import is_unnamed
from pipeline.evaluation.engine_outputs import OutputReader
from pipeline.evaluation.suppression import is_nms_free, suppress_overlaps
from pipeline.job import Job, choose_device
from pipeline.run.directory import CONFIG, Run
from pipeline.run.files import find_engine, model_name, target_of
from pipeline.run.progress import say

ENGINE_SUFFIXES = tuple(dict.fromkeys(end for entry in RUNTIMES.values() for end in entry.suffixes))
FLOAT = "float"
DEFAULT_SIZE = ImageSize.of(640)

Detect = Callable[[Tensor], Sequence[Found]]


@dataclass(frozen=True)
class Seen:
    """What was found in a picture, in its pixels.

    Attributes:
        boxes: float64 [N, 6]: x1, y1, x2, y2, score, class.
        masks: of each, where the network gives masks.
    """

    boxes: Tensor
    masks: list[Rle] | None

    @cached_property
    def pixels(self) -> list[NDArray[np.bool_]]:
        """The masks [H, W] of the codes; none for a network without."""
        return [decode_mask(code) for code in self.masks or ()]


@dataclass(frozen=True)
class Options:
    """How detections are made.

    Attributes:
        confidence: scores must be greater, 0..1.
        iou: class-wise NMS threshold.
        max_detections: boxes kept in an image.
        runtime: a name in `core.runtimes.RUNTIMES`, or "torch"; None takes the run's first that this machine can run,
            or the file's own.
        size: of the input; None takes what the model says.
        threads: CPU threads; None takes all.
        device: where torch runs: cpu, cuda, auto.
        trust: whether the code that a run's config.yaml names may run.
    """

    confidence: float = 0.25
    iou: float = 0.7
    max_detections: int = 300
    runtime: str | None = None
    size: ImageSize | None = None
    threads: int | None = None
    device: str = "auto"
    trust: bool = False

    def reader(self, form: str, masks: bool, nms_free: bool = False) -> OutputReader:
        """Reader of an engine's outputs with these thresholds."""
        iou = None if nms_free else self.iou
        return OutputReader(form, self.confidence, iou, self.max_detections, masks)


@dataclass(frozen=True)
class Predictor:
    """A loaded model.

    Attributes:
        label: what it is, for titles.
        names: class names by index.
        size: of the input.
        function: float32 images [1, 3, height, width] in 0..1 to detections in input pixels.
        task: `detect`, or `segment` where it gives masks.
        close: releases the model.
    """

    label: str
    names: tuple[str, ...]
    size: ImageSize
    function: Detect
    task: str = "detect"
    close: Callable[[], None] = lambda: None

    def detect(self, image: NDArray[np.uint8]) -> Seen:
        """Detections in a picture uint8 [H, W, 3], RGB."""
        boxed, info = letterbox(image, self.size)
        images = torch.from_numpy(boxed.transpose(2, 0, 1).copy())[None]
        with torch.inference_mode():
            (found,) = self.function(to_input(images, "cpu"))
        boxes, masks = to_picture(found, info, self.size)
        return Seen(torch.from_numpy(boxes), masks)


def open_predictor(path: Path, options: Options) -> Predictor:
    """Load a run directory, an .onnx, .xml or .engine file, or a float checkpoint.

    Raises:
        DeployError, RunError, CheckpointError: it cannot be used; the message says why.
    """
    if not path.exists():
        raise DeployError(f"No model at {path}: expected a run directory, an engine or a checkpoint.")
    if path.is_dir():
        return open_run(path, options)
    if path.suffix in ENGINE_SUFFIXES:
        return open_file(path, options)
    if options.runtime not in (None, TORCH):
        raise DeployError(
            f"--runtime {options.runtime} takes runs and {', '.join(ENGINE_SUFFIXES)} files; {path.name} is a "
            "checkpoint for torch: export it first."
        )
    detector = load_detector(path)
    detector = fold_detector(select_head(detector, detector.deployed_head))
    size = options.size or DEFAULT_SIZE
    return _of_torch(f"{path.name} (torch)", detector.network, detector, size, options)


def open_run(directory: Path, options: Options) -> Predictor:
    """The quantized model of a run: its engine where it has one that can run here, else in torch."""
    job = _job(directory, options)
    runtime = options.runtime or choose_runtime(job)
    if runtime == TORCH:
        network, row = job.networks.best()
        return _of_job(job, network, f"{row} (torch)", options)
    entry = RUNTIMES[runtime]
    graph = model_name(job.config, target_of(job.config, runtime))
    engine = find_engine(job.run, entry, graph)
    if engine is None:
        if not entry.reads_onnx:
            raise RunError(f"{directory} has no {entry.title} engine: run its stage engine")
        engine = job.run.need(graph, "export")
    return open_file(engine, options, runtime)


def choose_runtime(job: Job) -> str:
    """The run's first runtime whose engine this machine can run, else torch; a line says which were left out."""
    left_out = []
    for name in job.config.deploy.runtimes if job.run.is_done("engine") else ():
        reason = why_not_here(name)
        if reason is None:
            break
        left_out.append(reason)
    else:
        name = TORCH
    for reason in left_out:
        say(
            f"{reason} Using {RUNTIMES[name].title if name != TORCH else 'torch'}; --runtime chooses another."
        )
    return name


def why_not_here(runtime: str) -> str | None:
    """Why engines of a runtime do not run on this machine; None where they do."""
    found = runtime_class(runtime)
    try:
        found.require()
    except DeployError as error:
        return str(error)
    return None if found.can_run() else f"{RUNTIMES[runtime].title} engines need a GPU, and torch sees none."


def open_float(path: Path, options: Options) -> Predictor:
    """The float model of a run, or of the run that contains a file.

    Raises:
        DeployError: the file is not in a run directory.
    """
    directory = find_run(path)
    if directory is None:
        raise DeployError(
            f"--compare float: {path} is not in a run directory; give --compare the float model's path."
        )
    job = _job(directory, options)
    return _of_job(job, job.networks.detector.network, "float (torch)", options)


def open_other(path: Path, compared: str, options: Options) -> Predictor:
    """The model that the one at `path` is compared with: `float`, its run's float model, or another model's path.

    Raises:
        DeployError, RunError, CheckpointError: it cannot be used; the message says why.
    """
    if compared == FLOAT:
        return open_float(path, options)
    return open_predictor(Path(compared), replace(options, runtime=None))


def partner_classes(model: Predictor, other: Predictor) -> Tensor | None:
    """The class of `model` for each class of `other`, by name; None where their order is the same, or one has no names.

    Raises:
        DataError: models of different classes.
    """
    if len(other.names) == len(model.names) and (is_unnamed(model.names) or is_unnamed(other.names)):
        return None
    positions = class_positions(other.names, model.names)
    if positions is None:
        raise DataError(
            f"{model.label} knows {len(model.names)} classes ({listing(model.names, 5)}), {other.label} "
            f"{len(other.names)} ({listing(other.names, 5)}); compare models of the same classes."
        )
    if positions == sorted(positions):
        return None
    say(f"classes of {other.label} are in another order: matched by name")
    return torch.tensor(positions)


def find_run(path: Path) -> Path | None:
    """The run directory of a path; None for a path outside of runs."""
    folders = [path, *path.resolve().parents][:4]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _job(directory: Path, options: Options) -> Job:
    run = Run.open(directory)
    run.need("float.safetensors", "calibrate")
    config = read(run.path(CONFIG), trust=options.trust)
    config.device = options.device
    config.threads = options.threads or 0
    return Job(config, run)


def _of_job(job: Job, network: nn.Module, label: str, options: Options) -> Predictor:
    size = options.size or job.config.data.input_size
    return _of_torch(label, network, job.networks.detector, size, options)


def _of_torch(
    label: str, network: nn.Module, detector: Detector, size: ImageSize, options: Options
) -> Predictor:
    device = choose_device(options.device)
    network, decode = network.to(device).eval(), detector.decode.to(device).eval()
    iou = None if is_nms_free(decode) else options.iou

    def detect(images: Tensor) -> Sequence[Found]:
        decoded = decode(network(images.to(device)))
        return suppress_overlaps(decoded, options.confidence, iou, options.max_detections)

    return Predictor(label, tuple(detector.names), size, detect, detector.task)


# --------------------------------------------------------------------------------------------------------- engines
def open_file(path: Path, options: Options, runtime: str | None = None) -> Predictor:
    """Load an engine; class names, image size and form of the outputs come from its metadata.

    Raises:
        DeployError: a runtime that does not take the file, or a file that says too little.
    """
    side = options.size or ImageSize.of(2 * DEFAULT_SIZE.height)
    confine([path], 4 * 3 * side.height * side.width, options.trust or not runs_on_cpu(path))
    size = options.size or _stored_size(path)
    batch = find_batch(path) or 1
    request = EngineRequest(batch=batch, image_size=size, threads=options.threads)
    engine = _load(path, runtime or options.runtime, request)
    masks = engine.metadata.get("task") == "segment"
    nms_free = engine.metadata.get("octet.head") == ONE2ONE
    reader = options.reader(engine.metadata.get("octet.outputs", "decoded"), masks, nms_free)
    names = read_names(engine.metadata.get("names", ""))
    if not names:
        outputs = engine.infer_outputs(np.zeros((batch, 3, *size), np.float32))
        names = tuple(str(index) for index in range(reader.num_classes(outputs)))

    label = f"{path.name} ({engine.name}, {engine.precision})"
    task = "segment" if masks else "detect"
    return Predictor(label, names, size, reader.predictor(engine, batch), task, engine.close)


def _stored_size(path: Path) -> ImageSize:
    size = find_image_size(path)
    if size is None:
        raise DeployError(f"{path} does not state its image size; pass --size PIXELS or --size HEIGHTxWIDTH.")
    return ImageSize(*size)


def _load(path: Path, runtime: str | None, request: EngineRequest) -> Runtime:
    if runtime == TORCH:
        raise DeployError(f"--runtime torch does not take {path.name}; torch runs checkpoints and runs.")
    return open_engine(runtime or runtime_of(path, otherwise="onnxruntime"), path, request)


def read_names(text: str) -> tuple[str, ...]:
    """Class names from a file's metadata: a JSON object or a Python dictionary, number to name; () without any.

    Raises:
        DeployError: the text is neither.
    """
    if not text:
        return ()
    try:
        stored = json.loads(text) if text.lstrip().startswith('{"') else ast.literal_eval(text)
        if not isinstance(stored, dict) or not all(map(_is_name, stored.items())):
            raise TypeError
        numbered = {int(index): str(name) for index, name in stored.items()}
        return tuple(numbered[index] for index in range(len(numbered)))
    except (ValueError, TypeError, SyntaxError, KeyError, RecursionError, MemoryError) as error:
        raise DeployError(
            f"The file's class names are {text[:60]!r}; expected number to name, such as {{0: 'cat'}}."
        ) from error


def _is_name(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str | int) and isinstance(entry[1], str | int | float)
