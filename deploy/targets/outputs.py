"""What a graph gives: raw maps, decoded boxes, or detections after NMS. Passes on a graph whose output is `output0`.

- raw: the maps of the last convs, box_8, class_8, box_16 ...: for deployers who decode on their own;
- decoded: output0 [B, 4 + K, A]: cx, cy, w, h in input pixels, then class scores. The default, nothing is changed;
- end2end: output0 [B, N, 6]: x1, y1, x2, y2 in input pixels, score, class: the N best (anchor, class) pairs, by falling
  score; mask coefficients follow. For heads that give each object one box: nothing is suppressed;
- onnx_nms: detections [N, 7]: image of the batch, x1, y1, x2, y2 in input pixels, score, class; ONNX's own
  NonMaxSuppression;
- efficient_nms: num_dets [B, 1], det_boxes [B, M, 4] (corners), det_scores [B, M], det_classes [B, M]; TensorRT's
  plugin.

Both NMS are class-wise, and one box may come out with several classes, as in this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from core.errors import DeployError
from core.targets import OUTPUTS, Target
from deploy.graph.model import Graph, opset_of, tensor_shapes
from deploy.graph.passes import GraphPass, PassResult

DECODED, PROTOTYPES = "output0", "output1"
PLUGIN_DOMAIN = "TRT"
PLUGIN = "EfficientNMS_TRT"


@dataclass(frozen=True)
class NMSOptions:
    """Thresholds written into the graph.

    Attributes:
        confidence: lowest score kept.
        iou: boxes of one class that overlap more are dropped.
        max_detections: for an image (efficient_nms, end2end), or for one class of an image (onnx_nms).
    """

    confidence: float = 0.25
    iou: float = 0.7
    max_detections: int = 300


def output_pass(
    outputs: str, options: NMSOptions, target: Target, strides: Sequence[int] = (8, 16, 32)
) -> GraphPass:
    """The pass for one of `OUTPUTS`; raises DeployError on an unknown name or one that the target cannot run."""
    if outputs not in OUTPUTS:
        raise DeployError(f"Unknown outputs '{outputs}'; expected one of {', '.join(OUTPUTS)}.")
    if outputs not in target.outputs:
        plugin = "outputs=efficient_nms is TensorRT's plugin; " if outputs == "efficient_nms" else ""
        able = " or ".join(f"outputs={form}" for form in target.outputs)
        raise DeployError(f"{plugin}target {target.name} runs {able}, not {outputs}.")

    def change_outputs(graph: Graph) -> PassResult:
        if outputs == "decoded":
            return PassResult()
        if graph.outputs == [DECODED, PROTOTYPES] and outputs == "end2end":
            return end_to_end(graph, options)
        if graph.outputs != [DECODED]:
            raise DeployError(
                f"outputs={outputs} starts from '{DECODED}', the graph gives {', '.join(graph.outputs)}."
            )
        if outputs == "raw":
            return raw_maps(graph, strides)
        if outputs == "end2end":
            return end_to_end(graph, options)
        if outputs == "onnx_nms":
            return onnx_nms(graph, options)
        return efficient_nms(graph, options)

    return change_outputs


def raw_maps(graph: Graph, strides: Sequence[int]) -> PassResult:
    """Cut the decode off: the last convs' results become the outputs, by stride, fine to coarse.

    Raises:
        DeployError: the last convs are not one box and one class conv for each stride.
    """
    shapes = tensor_shapes(graph.commit())
    convs = _last_convs(graph)
    # fine to coarse: the largest maps have the smallest stride
    convs.sort(key=lambda node: -(shapes.get(node.output[0], (0, 0, 0))[2] or 0))
    named: dict[str, str] = {}
    for index, node in enumerate(convs):
        kind = "class" if _reaches(graph, node.output[0], "Sigmoid") else "box"
        stride = strides[index // 2] if index // 2 < len(strides) else 0
        named[f"{kind}_{stride}"] = node.output[0]
    wanted = [f"{kind}_{stride}" for stride in strides for kind in ("box", "class")]
    if sorted(named) != sorted(wanted) or len(convs) != len(wanted):
        raise DeployError(
            f"outputs=raw needs the convs {', '.join(wanted)} at the end, the graph has {len(convs)} there."
        )
    values = []
    for name in wanted:
        _rename(graph, named[name], name)
        shape = [size if size is not None else "batch" for size in shapes[named[name]]]
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    _set_outputs(graph, values)
    return PassResult(edits=len(values))


def _last_convs(graph: Graph) -> list[NodeProto]:
    before_conv: set[str] = set()
    last = []
    for node in reversed(graph.nodes):
        leads = any(name in before_conv for name in node.output)
        if node.op_type == "Conv" and not leads:
            last.append(node)
        if node.op_type == "Conv" or leads:
            before_conv.update(node.input)
    return last[::-1]


def _reaches(graph: Graph, tensor: str, op_type: str) -> bool:
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in graph.consumers.get(name, []):
            if node.op_type == op_type:
                return True
            pending.extend(node.output)
    return False


def _rename(graph: Graph, tensor: str, name: str) -> None:
    producer = graph.producers[tensor]
    for index, output in enumerate(producer.output):
        if output == tensor:
            producer.output[index] = name
    graph.rewire(tensor, name)
    graph.reindex()


def _set_outputs(graph: Graph, values: Sequence[ValueInfoProto]) -> None:
    del graph.model.graph.output[:]
    graph.model.graph.output.extend(values)
    graph.outputs = [value.name for value in values]
    graph.prune()


# ------------------------------------------------------------------------------------------------------------- NMS
class _Writer:
    """Appends nodes to a graph; names results after what they hold, with a prefix."""

    def __init__(self, graph: Graph, prefix: str = "nms") -> None:
        self.graph = graph
        self.prefix = prefix
        self.nodes: list[NodeProto] = []

    def constant(self, name: str, value: object, dtype: type[np.generic]) -> str:
        name = self.graph.unique(f"{self.prefix}/{name}")
        self.graph.constants[name] = np.asarray(value, dtype)
        return name

    def add(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        result = f"{self.prefix}/{name}"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [result], f"{result}/{op_type}", **attributes)
        )
        return result

    def columns(self, source: str, start: int, end: int, name: str, axis: int = 1) -> str:
        bounds = [
            self.constant(f"{name}_{part}", [value], np.int64)
            for part, value in (("start", start), ("end", end))
        ]
        return self.add("Slice", [source, *bounds, self.constant(f"{name}_axis", [axis], np.int64)], name)

    def corners(self, centre: str, size: str) -> tuple[str, str]:
        half = self.add("Mul", [size, self.constant("half", 0.5, np.float32)], "half_size")
        return self.add("Sub", [centre, half], "low"), self.add("Add", [centre, half], "high")

    def highest(self, source: str, name: str) -> str:
        """[B, K, A] -> [B, A]: the highest value over K."""
        if opset_of(self.graph.model) < 18:  # axes became an input
            return self.add("ReduceMax", [source], name, axes=[1], keepdims=0)
        return self.add("ReduceMax", [source, self.constant(f"{name}_axes", [1], np.int64)], name, keepdims=0)

    def best(self, source: str, number: int, name: str) -> tuple[str, str]:
        """[B, A] -> the highest values and where they are, [B, number] each."""
        values = self.add(
            "TopK", [source, self.constant(f"{name}_number", [number], np.int64)], f"{name}_score", axis=1
        )
        self.nodes[-1].output.append(f"{self.prefix}/{name}")
        return values, f"{self.prefix}/{name}"

    def pick(self, source: str, index: str, width: int, name: str) -> str:
        """[B, A, width] and [B, N] -> [B, N, width]: rows by their number."""
        column = self.add("Unsqueeze", [index, self.constant(f"{name}_axis", [2], np.int64)], f"{name}_index")
        wide = self.add(
            "Tile", [column, self.constant(f"{name}_repeats", [1, 1, width], np.int64)], f"{name}_indices"
        )
        return self.add("GatherElements", [source, wide], name, axis=1)


def _boxes_and_scores(writer: _Writer) -> tuple[str, str]:
    """Boxes [B, A, 4] as centre and size, scores [B, K, A], out of output0."""
    boxes = writer.columns(DECODED, 0, 4, "channels_of_boxes")
    scores = writer.columns(DECODED, 4, np.iinfo(np.int64).max, "scores")
    return writer.add("Transpose", [boxes], "boxes", perm=[0, 2, 1]), scores


def end_to_end(graph: Graph, options: NMSOptions) -> PassResult:
    """Append the choice of the best (anchor, class) pairs; see the module's text.

    The anchors with the best scores come first: N pairs lie on N anchors at most, so both steps choose from few values.
    """
    shapes = tensor_shapes(graph.commit())
    batch, rows, anchors = shapes[DECODED]
    extra = int(shapes[PROTOTYPES][1] or 0) if PROTOTYPES in graph.outputs else 0
    classes = int(rows or 0) - 4 - extra
    chosen = min(options.max_detections, anchors or options.max_detections)
    pairs = min(options.max_detections, chosen * classes)
    _rename(graph, DECODED, "decoded")
    writer = _Writer(graph, "top_k")
    scores = writer.columns("decoded", 4, 4 + classes, "scores")
    _, anchor = writer.best(writer.highest(scores, "highest_score"), chosen, "anchor")
    rows_of_anchors = writer.add("Transpose", ["decoded"], "rows", perm=[0, 2, 1])
    candidates = writer.pick(rows_of_anchors, anchor, 4 + classes + extra, "candidates")
    of_candidates = writer.columns(candidates, 4, 4 + classes, "scores_of_candidates", axis=2)
    flat = writer.add("Reshape", [of_candidates, writer.constant("flat_shape", [0, -1], np.int64)], "flat")
    score, pair = writer.best(flat, pairs, "pair")
    number = writer.constant("num_classes", classes, np.int64)
    place = writer.add("Div", [pair, number], "place")
    label = writer.add(
        "Cast", [writer.add("Mod", [pair, number], "label")], "label_number", to=TensorProto.FLOAT
    )
    found = writer.pick(candidates, place, 4 + classes + extra, "found")
    low, high = writer.corners(
        writer.columns(found, 0, 2, "centre", axis=2), writer.columns(found, 2, 4, "size", axis=2)
    )
    last = writer.constant("last", [2], np.int64)
    columns = [
        writer.add("Unsqueeze", [name, last], f"{name.split('/')[-1]}_column") for name in (score, label)
    ]
    coefficients = (
        [writer.columns(found, 4 + classes, 4 + classes + extra, "coefficients", axis=2)] if extra else []
    )
    result = helper.make_node(
        "Concat", [low, high, *columns, *coefficients], [DECODED], "top_k/detections", axis=2
    )
    graph.insert([*writer.nodes, result])
    values = [
        helper.make_tensor_value_info(DECODED, TensorProto.FLOAT, [batch or "batch", pairs, 6 + extra]),
        *(value for value in graph.model.graph.output if value.name == PROTOTYPES),
    ]
    _set_outputs(graph, values)
    return PassResult(edits=len(writer.nodes) + 1)


def onnx_nms(graph: Graph, options: NMSOptions) -> PassResult:
    """Append NonMaxSuppression and the gathering of its results; see the module's text."""
    writer = _Writer(graph)
    boxes, scores = _boxes_and_scores(writer)
    limits = [
        writer.constant("max_detections", [options.max_detections], np.int64),
        writer.constant("iou", [options.iou], np.float32),
        writer.constant("confidence", [options.confidence], np.float32),
    ]
    chosen = writer.add("NonMaxSuppression", [boxes, scores, *limits], "chosen", center_point_box=1)
    image, label, anchor = (
        writer.columns(chosen, i, i + 1, n) for i, n in enumerate(("image", "label", "anchor"))
    )
    place = writer.add("Concat", [image, anchor], "place", axis=1)
    box = writer.add("GatherND", [boxes, place], "box")
    score = writer.add("GatherND", [scores, chosen], "score")
    score = writer.add("Unsqueeze", [score, writer.constant("last_axis", [1], np.int64)], "score_column")
    centre, size = writer.columns(box, 0, 2, "centre"), writer.columns(box, 2, 4, "size")
    low, high = writer.corners(centre, size)
    image, label = (
        writer.add("Cast", [n], f"{m}_number", to=TensorProto.FLOAT)
        for n, m in ((image, "image"), (label, "label"))
    )
    detections = helper.make_node(
        "Concat", [image, low, high, score, label], ["detections"], "nms/detections", axis=1
    )
    graph.insert([*writer.nodes, detections])
    _set_outputs(graph, [helper.make_tensor_value_info("detections", TensorProto.FLOAT, ["detections", 7])])
    return PassResult(edits=len(writer.nodes) + 1)


def plugin_hint(error: Exception) -> str:
    """What to do where another runtime failed because it does not know TensorRT's plugin; empty for other errors."""
    if PLUGIN not in str(error):
        return ""
    return (
        " The graph ends in TensorRT's NMS plugin: build an engine from it (python -m deploy.engine build), or export "
        "with outputs=onnx_nms."
    )


def efficient_nms(graph: Graph, options: NMSOptions) -> PassResult:
    """Append TensorRT's EfficientNMS_TRT plugin node."""
    writer = _Writer(graph)
    boxes, scores = _boxes_and_scores(writer)
    scores = writer.add("Transpose", [scores], "scores_of_anchors", perm=[0, 2, 1])
    results = {
        "num_dets": (TensorProto.INT32, [1]),
        "det_boxes": (TensorProto.FLOAT, [options.max_detections, 4]),
        "det_scores": (TensorProto.FLOAT, [options.max_detections]),
        "det_classes": (TensorProto.INT32, [options.max_detections]),
    }
    plugin = helper.make_node(
        PLUGIN,
        [boxes, scores],
        list(results),
        "nms/EfficientNMS",
        domain=PLUGIN_DOMAIN,
        plugin_version="1",
        background_class=-1,  # no background class
        max_output_boxes=options.max_detections,
        score_threshold=options.confidence,
        iou_threshold=options.iou,
        score_activation=0,  # scores have been through the sigmoid
        class_agnostic=0,
        box_coding=1,  # centre and size
    )
    graph.insert([*writer.nodes, plugin])
    batch = graph.model.graph.input[0].type.tensor_type.shape.dim[0]
    first = batch.dim_value if batch.HasField("dim_value") else batch.dim_param
    _set_outputs(
        graph, [helper.make_tensor_value_info(n, t, [first, *shape]) for n, (t, shape) in results.items()]
    )
    graph.model.opset_import.append(helper.make_opsetid(PLUGIN_DOMAIN, 1))
    return PassResult(edits=len(writer.nodes) + 1)
