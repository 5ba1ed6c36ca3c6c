"""From official checkpoint keys to this package's names, and from a state dict's shapes to an architecture.

Official YOLOv9 checkpoints number their layers (`model.4.cv2.0.m.1.cv1.conv1.conv.weight`). Each of our keys has exactly one
official counterpart, found by walking our module tree: the network's table gives the layer, each block's `OFFICIAL_NAMES` the rest.
"""

from torch import nn

from models.yolov9 import YOLOv9Network


def official_keys(network: YOLOv9Network, prefix: str = "model") -> dict[str, str]:
    """Map every state-dict key of `network` to its name in an official single-head checkpoint.

    Example:
        `backbone.stage3.branch1.csp.entry.conv.weight` -> `model.4.cv2.0.cv1.conv.weight`.
    """
    return {key: f"{prefix}.{official_name(network, key)}" for key in network.state_dict()}


def official_name(network: YOLOv9Network, key: str) -> str:
    """Official name, without the leading `model.`, of one key or module path of `network`."""
    layer = next(name for name in network.official_layers if key == name or key.startswith(name + "."))
    parts = [str(network.official_layers[layer])]
    module: nn.Module = network.get_submodule(layer)
    rest = key[len(layer) + 1 :].split(".") if len(key) > len(layer) else []
    for part in rest:
        parts.append(_official_part(module, part))
        module = dict(module.named_children()).get(part, module)
    return ".".join(parts)


def _official_part(module: nn.Module, part: str) -> str:
    names: dict[str, str] = getattr(module, "OFFICIAL_NAMES", {})
    return next((official for official, ours in names.items() if ours == part), part)
