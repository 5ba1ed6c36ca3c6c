"""Placement and insertion of whole networks: what must hold for any of them, checked by a walker of its own."""

import pytest
import torch
from quant_networks import groups_of
from torch import nn

from models import build_detector, fold_detector
from quant import insert, place, quantized_layers

PASSED_MODULES = (nn.MaxPool2d, nn.Upsample, nn.Flatten, nn.Dropout)
PASSED_FUNCTIONS = {"cat", "chunk", "getitem", "split", "flatten", "max_pool2d", "transpose"}


def detector_network(architecture):
    """Without memory for its weights: placement reads only the graph and the shapes."""
    with torch.device("meta"):
        return fold_detector(build_detector(architecture, 3)).network


def torchvision_network(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        return getattr(models, name)().eval()


NETWORKS = {
    **{name: detector_network for name in ("yolov9t", "yolov9s", "yolov9m", "yolov9c", "yolov9e")},
    "resnet18": torchvision_network,
    "mobilenet_v3_small": torchvision_network,
    "squeezenet1_1": torchvision_network,
    "shufflenet_v2_x0_5": torchvision_network,
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def inserted(request):
    """(float network, placement, model) for each network."""
    network = NETWORKS[request.param](request.param)
    placement = place(network)
    return network, placement, insert(network, placement)


def is_quantizer(node):
    return node.op == "call_module" and str(node.target).startswith("activation_quantizers.")


def sources(node, model):
    """What a node's data comes from, behind everything that rounding commutes with."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    function = getattr(node.target, "__name__", "")
    if isinstance(module, PASSED_MODULES) or (node.op == "call_function" and function in PASSED_FUNCTIONS):
        return [source for parent in node.all_input_nodes for source in sources(parent, model)]
    if node.op == "call_method" and node.target in {"view", "transpose", "contiguous", "chunk"}:
        return sources(node.args[0], model)
    return [node]


def test_every_quantized_layer_reads_one_quantizer(inserted):
    """The master check: whatever meets in one layer's input has one scale."""
    _, placement, model = inserted
    layers = quantized_layers(model)
    assert set(layers) == {site.layer for site in placement.weights}
    seen = 0
    for node in model.graph.nodes:
        if node.op == "call_module" and str(node.target) in layers:
            found = sources(node.all_input_nodes[0], model)
            assert all(is_quantizer(source) for source in found), (node, found)
            assert len({source.target for source in found}) == 1, (node, found)
            seen += 1
    assert seen >= len(layers)


def test_no_tensor_is_rounded_twice(inserted):
    _, _, model = inserted
    for node in model.graph.nodes:
        assert sum(is_quantizer(user) for user in node.users) <= 1
        if is_quantizer(node):
            assert not any(is_quantizer(source) for source in sources(node.args[0], model))


def test_no_quantizer_between_a_convolution_and_its_activation(inserted):
    _, _, model = inserted
    layers = (nn.Conv2d, nn.Linear)
    activations = (nn.SiLU, nn.ReLU, nn.Hardswish, nn.Hardsigmoid, nn.BatchNorm2d)
    for node in model.graph.nodes:
        if is_quantizer(node):
            made_by = node.args[0]
            if made_by.op == "call_module" and isinstance(model.get_submodule(str(made_by.target)), layers):
                for user in node.users:
                    reads = model.get_submodule(str(user.target)) if user.op == "call_module" else None
                    assert not isinstance(reads, activations)


def test_no_quantizer_at_an_output_and_none_unread(inserted):
    _, _, model = inserted
    output = next(node for node in model.graph.nodes if node.op == "output")
    for node in model.graph.nodes:
        if is_quantizer(node):
            assert node.users
            assert output not in node.users
    for result in output.all_input_nodes:
        assert not any(is_quantizer(source) for source in sources(result, model))


def is_fresh(node, model):
    """Made by a convolution, its norm or its activation, and read once."""
    layers = (nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.ReLU)
    return (
        node.op == "call_module"
        and len(node.users) == 1
        and isinstance(model.get_submodule(str(node.target)), layers)
    )


def test_sums_read_their_skip_rounded_and_their_branch_not(inserted):
    """Rounding both costs a kernel of its own, rounding none keeps the skip in float."""
    _, _, model = inserted
    for node in model.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in {"add", "iadd"}:
            continue
        under_activation = [reader for user in node.users if len(node.users) == 1 for reader in user.users]
        if not any(is_quantizer(user) for user in [*node.users, *under_activation]):
            continue  # nobody reads this sum in INT8
        unrounded = [
            operand
            for operand in node.all_input_nodes
            if not all(is_quantizer(source) for source in sources(operand, model))
        ]
        assert len(unrounded) <= 1
        assert unrounded or not any(is_fresh(operand, model) for operand in node.all_input_nodes)


@pytest.mark.parametrize(
    ("architecture", "layers", "groups"),
    [
        ("yolov9t", 179, 145),
        ("yolov9s", 179, 145),
        ("yolov9m", 133, 97),
        ("yolov9c", 138, 97),
        ("yolov9e", 255, 201),
    ],
)
def test_how_much_of_each_size_is_quantized(architecture, layers, groups):
    """All convolutions but the head's six last ones."""
    network = detector_network(architecture)
    placement = place(network)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(placement.weights) == layers == convolutions - 6
    assert len(placement.groups) == groups
    assert set(placement.kept_float) == {f"head.{b}.{i}.output" for b in ("box", "cls") for i in range(3)}


def test_residual_classifier():
    """Written down for the first two stages of ResNet-18: sums under a rectifier that is called twice."""
    placement = place(torchvision_network("resnet18"))
    groups = groups_of(placement)
    assert groups["relu"] == ({"relu": ("maxpool",)}, ("layer1.0.conv1",))  # max-pool, then conv1 and the sum
    assert groups["layer1.0.relu_0"] == ({"layer1.0.relu_0": ("layer1_0_conv2",)}, ("layer1.0.conv2",))
    assert groups["layer1.0.relu_1"] == (
        {"layer1.0.relu_1": ("layer1_1_conv1", "add_1")},
        ("layer1.1.conv1",),
    )
    assert groups["layer1.1.relu_1"] == (
        {"layer1.1.relu_1": ("layer2_0_conv1", "layer2_0_downsample_0")},
        ("layer2.0.conv1", "layer2.0.downsample.0"),
    )
    # where both operands come from a convolution, the longer path is the one that is fused
    assert groups["layer2.0.downsample.1"] == ({"layer2.0.downsample.1": ("add_2",)}, ())
    assert len(placement.weights) == 20
    assert placement.kept_float == {"fc": "its result leaves the network"}


def test_classifier_with_gates():
    """MobileNetV3: hard-swish, squeeze-and-excitation gates (a product is float), depthwise convolutions, linear."""
    placement = place(torchvision_network("mobilenet_v3_small"))
    groups = groups_of(placement)
    gate = "features.4.block.2"
    assert groups["features.4.block.1.2"] == ({"features.4.block.1.2": ("features_4_block_2_avgpool",)}, ())
    assert groups[f"{gate}.avgpool"] == ({f"{gate}.avgpool": ("features_4_block_2_fc1",)}, (f"{gate}.fc1",))
    assert groups[f"{gate}.mul"] == ({f"{gate}.mul": ("features_4_block_3_0",)}, ("features.4.block.3.0",))
    assert groups["avgpool"] == ({"avgpool": ("flatten",)}, ("classifier.0",))
    assert placement.kept_float == {"classifier.3": "its result leaves the network"}
