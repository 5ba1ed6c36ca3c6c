"""Replaces SiLU, which INT8 engines compute in float between two INT8 convolutions, by a cheaper activation.

After a convolution, ReLU costs an engine nothing, and hard-swish less than SiLU. hard-swish(x) = x relu6(x + 3) / 6 is
the piecewise approximation of SiLU in Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 5.2.
"""

from __future__ import annotations

import copy

from torch import nn

from core.choices import CHEAP_ACTIVATIONS
from core.errors import ConfigError

_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}


def swap_activation(network: nn.Module, name: str) -> nn.Module:
    """A copy of a network with every `nn.SiLU` replaced; its weights stay, so it has to be fine-tuned.

    Args:
        network: any network; it is not changed.
        name: `relu` or `hardswish`.

    Raises:
        ConfigError: another name, or a network without an `nn.SiLU` module.
    """
    if name not in _MODULES:
        raise ConfigError(f"activation {name!r} cannot replace SiLU: choose {' or '.join(CHEAP_ACTIVATIONS)}")
    swapped = copy.deepcopy(network)
    check_swappable(swapped, name)
    for parent, child in _places(swapped):
        setattr(parent, child, _MODULES[name]())
    return swapped.train(network.training)


def check_swappable(network: nn.Module, setting: str) -> None:
    """Raise ConfigError for a network without an `nn.SiLU` module; `setting` is that of `quant.swap_activation`."""
    if not _places(network):
        raise ConfigError(
            f"quant.swap_activation={setting}: the network has no SiLU module to replace; leave the setting out"
        )


def _places(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every SiLU of a network: the module that has it, and its name there."""
    return [
        (parent, child)
        for parent in network.modules()
        for child, module in parent.named_children()
        if isinstance(module, nn.SiLU)
    ]
