"""What a model family is to the rest of the package: how its networks are built, and how its checkpoints look."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.boxes import Decode
from models.families.training_forms import TrainingForm
from models.heads import HeadBuilder
from models.segmentation import SegmentationDecode

PROTOTYPES = re.compile(r"^(?:model\.\d+\.proto|network\.head\.prototypes)\.(\w+)\.")

NetworkBuilder = Callable[[int, str, HeadBuilder], nn.Module]


def has_prototypes(state: Mapping[str, Tensor]) -> bool:
    """Whether a normalised state dict has mask prototypes."""
    return any(PROTOTYPES.match(key) for key in state)


@dataclass(frozen=True)
class Family:
    """One family; `core.families` has its name and those of its architectures.

    A network has `official_layers`: module path -> layer index in the checkpoints that the original trainer writes.
    Blocks whose parts are called otherwise there have `OFFICIAL_NAMES`. State dicts are normalised ones (see
    `models.checkpoints.convert.normalise_key`).

    Attributes:
        builders: Architecture -> function from the number of classes, the activation and the head's builder.
        strides: Input pixels per cell for each level, fine to coarse.
        heads: Head style (whose trainer's head it is) -> its builder, for detectors.
        segmentation_heads: The same for architectures that give masks.
        class_bias: Matches the key of the finest level's class bias; its length is the number of classes.
        has_masks: Whether a state dict has mask prototypes.
        find_head_style: The head style that a state dict shows, a key of `heads` or of `segmentation_heads`; `official`
            for families with one style.
        training_forms: Forms of training checkpoints that differ from the deployed form.
        training_only: Matches the keys of parts that only training uses; they are left out.
        decode: Builds the float module from raw maps to the decoded output, given the strides.
        segmentation_decode: The same for architectures that give masks.
    """

    builders: Mapping[str, NetworkBuilder]
    strides: tuple[int, ...]
    heads: Mapping[str, HeadBuilder]
    segmentation_heads: Mapping[str, HeadBuilder]
    class_bias: re.Pattern[str]
    has_masks: Callable[[Mapping[str, Tensor]], bool] = has_prototypes
    find_head_style: Callable[[Mapping[str, Tensor]], str] = lambda state: "official"
    training_forms: tuple[TrainingForm, ...] = ()
    training_only: re.Pattern[str] | None = None
    decode: Callable[[Sequence[int]], nn.Module] = Decode
    segmentation_decode: Callable[[Sequence[int]], nn.Module] = SegmentationDecode
