"""Your own network: what `model.factory` returns, how it is checked, kept and built again.

    def build(names: Sequence[str]) -> CustomDetector

The factory gets the class names of the data and returns the parts below. It is called anew whenever the detector is
needed (also by `export.py`) and then given the weights of the run, so it must build the same network each time.
docs/custom.md has a complete example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError
from core.files import written_atomically
from core.image_size import ImageSize
from core.names import listing
from core.types import TaskLoss
from models import Decode, DetectionLoss, Detector, read_checkpoint
from models.checkpoints.loading import check_finite
from pipeline.user_code.factories import call_user, load_factory
from quant import fold_batchnorms

SETTING = "model.factory"
TRACE_TOLERANCE = 1e-3  # of the largest value of a map, in float32


@dataclass(frozen=True)
class CustomDetector:
    """The parts of a detector that Octet did not build.

    Attributes:
        network: images float32 [B, 3, H, W], RGB, 0 to 1, letterboxed -> maps: a tensor, or a nested tuple, list or
            dictionary of tensors. torch.fx must be able to trace it; this part is quantized. Normalisation by mean and
            deviation belongs into it. Its raw convolution results are the best outputs: what follows is `decode`'s.
        decode: module from the maps to [B, 4 + K, A]: cx, cy, w, h in input pixels, then K class scores in 0..1 (no
            background). Always float; it is part of the ONNX file. None: the maps are Octet's own, for each of
            `strides` (box [B, 64, h, w] of 16 bins for each side, class logits [B, K, h, w]).
        loss: (maps, targets, (height, width)) -> dictionary of scalar terms, already weighted; their sum is minimised.
            Targets are float32 [T, 6]: index in the batch, class from 0, x1, y1, x2, y2 in input pixels; an image may
            have none. None: Octet's detection loss, where `decode` is None, too.
        names: class names that the network was made for; None takes the data's.
        strides: input pixels per cell of each level, fine to coarse; needed where `decode` is None, and written into
            the ONNX file.
    """

    network: nn.Module
    decode: nn.Module | None = None
    loss: TaskLoss | None = None
    names: Sequence[str] | None = None
    strides: Sequence[int] = ()


class OwnDetector(Detector):
    """A detector out of `model.factory`; its loss travels with it."""

    def __init__(self, parts: CustomDetector, names: Sequence[str], reference: str) -> None:
        super().__init__(
            parts.network,
            Decode(parts.strides) if parts.decode is None else parts.decode,
            names=names,
            strides=parts.strides,
            architecture=f"custom ({reference})",
            activation="custom",
        )
        self.loss: TaskLoss = DetectionLoss(len(names), parts.strides) if parts.loss is None else parts.loss


class CustomModel:
    """Builds, checks, keeps and restores the detector of a factory.

    Args:
        reference: `package.module:function`.
        names: class names of the data.
        size: of the network's input.
    """

    def __init__(self, reference: str, names: Sequence[str], size: ImageSize) -> None:
        self.reference = reference
        self.names = tuple(names)
        self.size = size

    def build(self) -> OwnDetector:
        """The detector with the factory's own weights, not folded.

        Raises:
            ConfigError: the factory fails, or returns something else than it should.
        """
        factory = load_factory(SETTING, self.reference)
        parts = call_user(SETTING, self.reference, "the call", factory, self.names)
        self._check_parts(parts)
        return OwnDetector(parts, self.names, self.reference)

    def initial(self, weights: Path | None) -> OwnDetector:
        """The detector that a run starts from, checked on a dummy batch.

        Args:
            weights: a state dict of the network (`.safetensors`, `.pt`, `.npz`), loaded strictly; None keeps the
                factory's own.

        Raises:
            ConfigError: maps, decode or loss are not as `CustomDetector` says.
            TraceError: the network cannot be traced; the message names the line.
            CheckpointError: the weights do not fit.
        """
        detector = self.build()
        if weights is not None:
            load_state(detector.network, weights)
        self.check(detector)
        return detector

    def keep(self, detector: Detector, path: Path) -> None:
        """Write the network's weights under its own names, unfolded, whole or not at all."""
        state = {
            key: value.detach().cpu().clone().contiguous()
            for key, value in detector.network.state_dict().items()
        }
        with written_atomically(path) as (part,):
            save_file(state, part, metadata={"octet-custom": self.reference})

    def restore(self, path: Path) -> OwnDetector:
        """The detector with weights that `keep` wrote: folded, traced, in evaluation mode."""
        detector = self.build()
        load_state(detector.network, path)
        detector.network = fold_batchnorms(detector.network)
        detector.folded = True
        return detector.eval()

    # -- checks

    def _check_parts(self, parts: Any) -> None:
        if not isinstance(parts, CustomDetector):
            raise self._error(
                f"it returned {_kind(parts)}; expected CustomDetector(network=..., decode=..., loss=...) from "
                "pipeline"
            )
        if not isinstance(parts.network, nn.Module):
            raise self._error(f"network is {_kind(parts.network)}; expected a torch.nn.Module")
        if not isinstance(parts.decode, nn.Module | None):
            raise self._error(f"decode is {_kind(parts.decode)}; expected a torch.nn.Module")
        if parts.loss is not None and not callable(parts.loss):
            raise self._error(f"loss is {_kind(parts.loss)}; expected loss(maps, targets, (height, width))")
        if parts.decode is None and not parts.strides:
            raise self._error("without decode, strides are needed: for instance strides=(8, 16, 32)")
        if parts.decode is not None and parts.loss is None:
            raise self._error("loss is missing: a network with its own decode needs its own loss")
        named = tuple(parts.names) if parts.names is not None else self.names
        if [name.lower() for name in named] != [name.lower() for name in self.names]:
            raise self._error(
                f"names are {', '.join(named[:6])} ({len(named)}), those of the data {', '.join(self.names[:6])} "
                f"({len(self.names)}): they must be the same in the same order; map them with data.merge_classes"
            )

    def check(self, detector: OwnDetector) -> None:
        """Run two images through every part as the job will; errors as for `initial`."""
        height, width = self.size
        images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        training = detector.training
        network = detector.network.eval()
        traced = fold_batchnorms(network)
        with torch.no_grad():
            maps = self._call("the network", network, images)
            self._check_maps(maps, traced(images))
            decoded = self._call("decode", detector.decode.eval(), maps)
            self._check_decoded(decoded)
            targets = torch.tensor([[0.0, 0.0, 0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
            terms = self._call("loss", detector.loss, maps, targets, (height, width))
        self._check_terms(terms)
        detector.train(training)

    def _check_maps(self, maps: Any, traced: Any) -> None:
        expected, found = _tensors(maps), _tensors(traced)
        if not expected or any(value is None for value in expected):
            raise self._error(
                f"the network returned {_kind(maps)}; expected tensors, or nested tuples, lists or dictionaries of them"
            )
        for a, b in zip(expected, found, strict=True):
            assert a is not None
            assert b is not None
            if float((a - b).abs().max()) > TRACE_TOLERANCE * max(float(a.abs().max()), 1e-6):
                raise self._error(
                    "the traced network does not compute the same as the network itself: its forward must not draw "
                    "random numbers or depend on state outside of it in evaluation mode"
                )

    def _check_decoded(self, decoded: Any) -> None:
        rows = 4 + len(self.names)
        if not isinstance(decoded, Tensor) or decoded.ndim != 3 or tuple(decoded.shape[:2]) != (2, rows):
            raise self._error(
                f"decode returned {_kind(decoded)}; expected a tensor [2, {rows}, A] for two images and "
                f"{len(self.names)} classes: cx, cy, w, h, then the scores"
            )
        if not bool(decoded.isfinite().all()):
            raise self._error("decode returned values that are not finite for images in 0..1")
        low, high = float(decoded[:, 4:].min()), float(decoded[:, 4:].max())
        if low < 0 or high > 1:
            raise self._error(
                f"decode returned class scores from {low:.3g} to {high:.3g}; expected 0 to 1: apply sigmoid or softmax "
                "in it"
            )

    def _check_terms(self, terms: Any) -> None:
        if not isinstance(terms, dict) or not terms:
            raise self._error(f"loss returned {_kind(terms)}; expected a dictionary of named scalar tensors")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.numel() != 1 or not bool(term.isfinite().all()):
                raise self._error(
                    f"loss term {name!r} is {_kind(term)} for one object in the first of two images; expected a finite "
                    "scalar tensor"
                )

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return call_user(SETTING, self.reference, what, function, *arguments)

    def _error(self, text: str) -> ConfigError:
        return ConfigError(f"{SETTING}={self.reference}: {text}")


def load_state(network: nn.Module, path: Path) -> None:
    """Load a state dict into a network: every tensor present, none left over, shapes equal.

    The counters of normalisations (`num_batches_tracked`) may be missing.

    Raises:
        CheckpointError: the file cannot be read or does not fit; the message lists the keys.
    """
    state = read_checkpoint(path).state
    own = network.state_dict()
    problems = []
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    for label, keys in (("lacks", missing), ("has besides", extra), ("has in other shapes", shapes)):
        if keys:
            problems.append(f"{label} {listing(keys, 6)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit the network of model.factory: it {'; it '.join(problems)}. Give a state dict of "
            "exactly this network"
        )
    check_finite(state, str(path))
    network.load_state_dict({**{key: own[key] for key in own if key not in state}, **state})


def _tensors(value: Any) -> list[Tensor | None]:
    """Tensors of a nested structure, in order; None replaces anything that is not a tensor."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [None]


def _kind(value: Any) -> str:
    """A value in words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}" + (f" of value {value.item()}" if value.numel() == 1 else "")
    return "None" if value is None else f"a {type(value).__name__}"
