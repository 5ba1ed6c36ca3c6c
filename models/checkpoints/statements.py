"""What a pickled model states in addition to its tensors, compared with the network that its keys and shapes show.

A network may have all keys and shapes of a known one and still compute something else: no activation after a
convolution, other strides. Such a file is refused, since its figures would be wrong without a sign.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import CheckpointError
from core.names import listing
from models.blocks import ConvBlock, ConvNorm
from models.checkpoints.convert import normalise_key, official_name
from models.checkpoints.foreign import MAX_KEYS_SHOWN
from models.checkpoints.reading import ACTIVATION_CLASSES
from models.detector import Detector
from models.families.training_forms import Conversion


def check_kinds(metadata: Mapping[str, Any], source: str) -> None:
    """Refuse several kinds of activations or normalisations, and activations that are not implemented.

    Raises:
        CheckpointError: Names what the file has.
    """
    kinds = metadata.get("activation_classes", [])
    if len(kinds) > 1 or not set(kinds) <= set(ACTIVATION_CLASSES):
        raise CheckpointError(
            f"{source}: the model's activations are {listing(kinds, 8)}; expected SiLU or ReLU throughout"
        )
    epsilons = metadata.get("batch_norm_epsilons", [])
    if len(epsilons) > 1:
        raise CheckpointError(
            f"{source}: the model's normalisations use several eps: {epsilons[:4]}; expected one"
        )


def check_statements(
    detector: Detector, metadata: Mapping[str, Any], conversion: Conversion | None, source: str
) -> None:
    """Compare the strides, and which convolutions an activation follows.

    Raises:
        CheckpointError: If the file says otherwise than the network has it.
    """
    strides = metadata.get("strides")
    if strides is not None and tuple(strides) != detector.strides:
        raise CheckpointError(
            f"{source} states strides {tuple(strides)}; {detector.architecture} has {detector.strides}"
        )
    stated = _deployed(metadata.get("activated", {}), conversion)
    wrong = []
    for name, module in detector.network.named_modules():
        if isinstance(module, ConvNorm):
            key = f"model.{official_name(detector.network, name)}"
            is_activated = isinstance(module, ConvBlock)
            if stated.get(key, is_activated) != is_activated:
                wrong.append(key)
    if wrong:
        raise CheckpointError(
            f"{source} has an activation where {detector.architecture} has none, or none where it has one, after "
            f"{listing(wrong, MAX_KEYS_SHOWN)}: a changed network, see model=custom in docs/custom.md"
        )


def _deployed(activated: Mapping[str, bool], conversion: Conversion | None) -> dict[str, bool]:
    """Paths in the file's model to paths in the deployed form."""
    result = {}
    for path, is_activated in activated.items():
        name: str | None = normalise_key(f"{path}.act").removesuffix(".act")
        if conversion is not None:
            name = conversion.form.deployed_key(str(name))
        if name is not None:
            result[name] = is_activated
    return result
