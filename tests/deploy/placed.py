"""Networks as a run exports them: placed, with quantizers of fixed scales, and with nodes named by module path."""

import numpy as np
import torch

from deploy import export_onnx
from pipeline.stages.export import Deployed
from quant import (
    Mode,
    activation_quantizers,
    insert,
    place,
    quantized_layers,
    set_mode,
    with_named_nodes,
)


def quantized(network, placement):
    """The network with its quantizers on; every group has a scale of its own, so that unequal ones are seen."""
    model = insert(network, placement).eval()
    for index, quantizer in enumerate(activation_quantizers(model).values()):
        quantizer.set_scale(0.02 + 0.0001 * index)
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_scale(layer.weight_quantizer.amax_scale(layer.weight), layer.weight)
    set_mode(model, Mode.QUANTIZE)
    return model


def export_named(network, decode, path, size, target, outputs=("output0",), is_quantized=True):
    """Export a network, quantized or float, in the way of the stage `export`."""
    named, names = with_named_nodes(network)
    images = [np.random.default_rng(0).random((1, 3, *size), np.float32)] if target == "onnxruntime" else []
    return export_onnx(
        Deployed(named, decode).eval(), path, size, target, output_names=outputs, quantized=is_quantized,
        images=images, names=names,
    ).path  # fmt: skip


def placed_file(network, path, target="trt10", options=None, rules=(), size=(32, 32)):
    """A small network, placed and exported without a decode."""
    placement = place(network.eval(), options, tuple(rules))
    return export_named(quantized(network, placement), torch.nn.Identity(), path, size, target)
