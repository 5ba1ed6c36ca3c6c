"""Fine-tuning with both heads of a network that deploys one of them (`qat.both_heads`).

The other head is kept in float next to the quantized model and is removed at the end. As in float training, the
one-to-one head reads detached features, and everything before the heads learns from the one-to-many head
(arXiv:2405.14458, section 3.1). Each head has its own loss and its own teacher.
"""

from __future__ import annotations

import copy

from torch import fx, nn

from core.choices import ONE2ONE
from core.errors import ConfigError
from core.types import TaskLoss
from models import detector_loss
from models.dual_heads import PREFIXES, DualHead
from pipeline.networks import Networks
from quant import Mode, insert, placement_of, set_mode


def with_other_head(networks: Networks, model: fx.GraphModule) -> tuple[fx.GraphModule, nn.Module, TaskLoss]:
    """What fine-tuning trains instead of a quantized model.

    Returns:
        The model with its other head, the float network with both heads as its teacher, and the loss of both heads.

    Raises:
        ConfigError: the run's network has one head only.
    """
    whole = networks.whole
    if len(whole.heads) < 2:
        raise ConfigError(
            f"qat.both_heads=true: {whole.architecture} has the head {', '.join(whole.heads)} only; use false"
        )
    network = copy.deepcopy(whole.network)
    head = network.get_submodule("head")
    assert isinstance(head, DualHead)
    head.detaches = False  # the graph is then, up to the heads, the one that was placed
    student = insert(network, placement_of(model), networks.config.qat.learn_scales)
    student.load_state_dict({**student.state_dict(), **model.state_dict()})
    _detach_one_to_one(student)
    set_mode(student, Mode.QUANTIZE)
    return student.to(networks.device).eval(), copy.deepcopy(whole.network), detector_loss(whole)


def without_other_head(student: fx.GraphModule, model: fx.GraphModule) -> fx.GraphModule:
    """The quantized model with the weights and scales that `with_other_head`'s student has learned."""
    learned = student.state_dict()
    model.load_state_dict({name: learned[name] for name in model.state_dict()})
    return model


def _detach_one_to_one(student: fx.GraphModule) -> None:
    """Detach every tensor that enters the one-to-one head, after its quantizer."""
    prefix = f"head.{PREFIXES[ONE2ONE]}"
    inside = {
        node
        for node in student.graph.nodes
        if node.op == "call_module" and str(node.target).startswith(prefix)
    }
    for node in list(inside):
        for source in node.all_input_nodes:
            if not _comes_from(source, inside):
                with student.graph.inserting_before(node):
                    detached = student.graph.call_method("detach", (source,))
                node.replace_input_with(source, detached)
    student.graph.lint()
    student.recompile()


def _comes_from(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a tensor is one of the head's own, through its quantizer."""
    return node in inside or any(source in inside for source in node.all_input_nodes)
