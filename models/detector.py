"""A detector: a network, its float decode, and what a user must know about both."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from core.choices import ONE2MANY, ONE2ONE
from core.families import SEGMENTERS
from models.boxes import Decode
from models.dual_heads import DualHead, keep_head
from models.families.registry import family_of
from models.segmentation import SegmentationDecode

MAX_CLASSES = 10_000


class Detector(nn.Module):
    """A network with its float decode and what a user must know about both.

    `detector(images)` gives [B, 4 + K, A]: cx, cy, w, h in input pixels, then class scores in [0, 1].

    Attributes:
        network: Images to raw per-level maps; the part that is traced and quantized.
        decode: Raw maps to the decoded output; always float.
        num_classes: K.
        names: K class names.
        strides: Input pixels per cell for each level, fine to coarse.
        architecture: One of `core.families.ARCHITECTURES`.
        activation: `silu` or `relu`.
        head_style: A key of the family's heads.
        folded: True once batch normalisation is folded and parallel branches are merged.
        amax: Largest magnitudes that a quantized checkpoint carried, by `<path of a convolution in network>.input`
            (scalar) and `.weight` (per output channel); empty otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        decode: nn.Module,
        *,
        names: Sequence[str],
        strides: Sequence[int],
        architecture: str,
        activation: str,
        head_style: str = "official",
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.decode = decode
        self.names = tuple(names)
        self.strides = tuple(strides)
        self.architecture = architecture
        self.activation = activation
        self.head_style = head_style
        self.folded = folded
        self.amax: dict[str, Tensor] = {}

    @property
    def task(self) -> str:
        """`detect`, or `segment` if the decode gives coefficients and prototypes too."""
        return "segment" if isinstance(self.decode, SegmentationDecode) else "detect"

    @property
    def heads(self) -> tuple[str, ...]:
        """Which heads the network has: `one2many`, `one2one` (see `models.dual_heads`), or both."""
        head = getattr(self.network, "head", None)
        return head.heads if isinstance(head, DualHead) else (ONE2MANY,)

    @property
    def deployed_head(self) -> str:
        """The head that `decode` takes the maps of."""
        return str(getattr(self.decode, "head", ONE2MANY))

    def deploy_head(self, head: str) -> None:
        """Let `decode` take the maps of this head."""
        assert isinstance(self.decode, Decode)
        self.decode.head = head

    @property
    def reg_max(self) -> int:
        """R, bins of a box side's distribution; 1 where the maps are the distances."""
        assert isinstance(self.decode, Decode)
        return self.decode.reg_max

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.names)

    def forward(self, images: Tensor) -> Any:
        """[B, 3, H, W] to the decoded output [B, 4 + K, A], or to what `SegmentationDecode` gives."""
        return self.decode(self.network(images))


def placeholder_names(num_classes: int) -> tuple[str, ...]:
    """`class0`, `class1`, ...: what classes are called that nobody has named."""
    return tuple(f"class{index}" for index in range(num_classes))


def build_detector(
    architecture: str,
    num_classes: int,
    activation: str = "silu",
    names: Sequence[str] | None = None,
    head_style: str = "official",
) -> Detector:
    """Build a detector with random weights and the head's biases set for training from scratch.

    Args:
        architecture: One of `core.families.ARCHITECTURES`, e.g. `yolov9t`.
        num_classes: K, at least 1.
        activation: `silu` or `relu`.
        names: K class names; `class0`, `class1`, ... when None.
        head_style: A key of the family's heads: which trainer's head it has.

    Returns:
        A detector in training mode, with batch normalisation and parallel branches.

    Raises:
        ValueError: For an unknown architecture, activation or head, or when K and the names disagree.
    """
    family = family_of(architecture)
    segments = architecture in SEGMENTERS
    heads = family.segmentation_heads if segments else family.heads
    if head_style not in heads:
        raise ValueError(f"Head {head_style!r} is unknown; expected one of {', '.join(heads)}")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; expected 1 to {MAX_CLASSES}")
    chosen = tuple(names) if names is not None else placeholder_names(num_classes)
    if len(chosen) != num_classes:
        raise ValueError(
            f"{len(chosen)} names were given for {num_classes} classes; give one name for each class"
        )
    detector = Detector(
        family.builders[architecture](num_classes, activation, heads[head_style]),
        (family.segmentation_decode if segments else family.decode)(family.strides),
        names=chosen,
        strides=family.strides,
        architecture=architecture,
        activation=activation,
        head_style=head_style,
    )
    if ONE2ONE in detector.heads:
        detector.deploy_head(ONE2ONE)
    return detector


def select_head(detector: Detector, head: str) -> Detector:
    """The detector with one of its heads alone; itself where it has no other.

    Args:
        detector: Any detector; it is not changed.
        head: `one2many` or `one2one`.

    Raises:
        ValueError: If it does not have this head.
    """
    if head not in detector.heads:
        raise ValueError(f"{detector.architecture} has the head {', '.join(detector.heads)}, not {head}")
    if detector.heads == (head,):
        return detector
    chosen = copy.deepcopy(detector)
    keep_head(chosen.network.get_submodule("head"), head)
    chosen.head_style = head
    chosen.deploy_head(head)
    return chosen
