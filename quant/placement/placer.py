"""Placement: which tensors of a network get a quantizer, and which of them share one scale.

A weighted layer (convolution, linear) demands INT8 data. Each demand is walked back through the operations
that quantize-dequantize commutes with (concat, split, max-pool, nearest upsampling, reshapes) to the tensors that
were really computed: an activation's output, a residual sum, an average, the image. These get one fake
quantizer each, directly after their producer. Tensors that meet in one concat, and demands that meet in one tensor,
share one scale (union-find), so that an engine moves INT8 data from producer to consumer without a single
requantization. Sources of the rules: NVIDIA's tensorflow-quantization guide (custom Q/DQ cases) and modelopt.

Residual sums, with or without an activation after them: the skip operand reads the quantized tensor, the other
operand stays unquantized so that the engine can fuse convolution, activation and sum into one kernel.

    x --Q--+--> conv -> act -> conv -> act --+--> add --Q--> ...
           +---------------------------------+
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from core.choices import ATTENTION, FP8, INTEGER
from core.grid import FP8_E4M3, FP8_WEIGHTS, Grid
from core.operators import Kind, fused_summand, narrow_reason, unsupported_reason
from quant.graph import WEIGHTED_MODULES, inputs_of, is_nonnegative, kind_of, paths_of, trace
from quant.placement.placement import Group, MatmulSite, Placement, TensorSite, WeightSite
from quant.placement.policy import Policy, Rule


@dataclass(frozen=True)
class PlacementOptions:
    """Defaults that policy rules refine.

    Attributes:
        weight_bits: width of weight grids, 2 to 8.
        activation_bits: width of activation grids, 2 to 8.
        edge_bits: least width of the network's input, of the weights that read it, and of output layers (where those
            are quantized): they lose most at few bits and cost least.
        share_concat_scales: whether concats share one scale over their inputs.
        quantize_outputs: whether layers whose result leaves the network are quantized, too (they carry the
            network's answer and are the most sensitive ones).
        quantize_narrow: whether layers too narrow for a good INT8 kernel, or without any in 8 bits, are quantized, too.
        unsigned: whether groups that are never negative (after a ReLU or sigmoid; images, which are in [0, 1]) use
            codes from 0 to 255: half the step for the same range. CPU engines run it, TensorRT takes signed codes only.
            FP8 groups are signed.
        attention: of products of two tensors `float` leaves all in float, `matmul` quantizes both operands. Their
            convolutions are quantized in either case.
        grid: kind of the grids, `integer` or `fp8`. Weights take the kind of the group that their layer reads; FP8 has
            no use for the widths above. Layers that read the network's input stay float with `fp8` unless a rule names
            a kind for the input: images are spread evenly over [0, 1], and FP8 has steps of 1/16 in the upper half.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    edge_bits: int = 8
    share_concat_scales: bool = True
    quantize_outputs: bool = False
    quantize_narrow: bool = False
    unsigned: bool = False
    attention: str = ATTENTION[0]
    grid: str = INTEGER


def place(
    network: nn.Module, options: PlacementOptions | None = None, rules: tuple[Rule, ...] = ()
) -> Placement:
    """Decide where fake quantizers go in a network.

    Args:
        network: any fx-traceable module, BN folded; it is only read.
        options: defaults for every layer and tensor.
        rules: policy rules; the last match wins.

    Raises:
        TraceError: the network cannot be traced.
        PolicyError: a rule matches nothing.
    """
    return _Placer(trace(network), options or PlacementOptions(), Policy(rules)).placement()


class _Placer:
    """State of one placement: demands still to walk, edges found so far, and the union-find over producers."""

    def __init__(self, network: fx.GraphModule, options: PlacementOptions, policy: Policy) -> None:
        self.options = options
        self.policy = policy
        self.nodes = list(network.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.modules = dict(network.named_modules())
        self.kinds = {node: kind_of(node, self.modules) for node in self.nodes}
        self.paths = paths_of(network.graph)
        self.kept_float: dict[str, str] = {}
        self.concats: dict[str, bool] = {}
        self.edges: dict[fx.Node, set[fx.Node]] = {}  # producer -> readers of the quantized tensor
        self.parent: dict[fx.Node, fx.Node] = {}

    def placement(self) -> Placement:
        weighted = [node for node in self.nodes if self.kinds[node] is Kind.WEIGHTED]
        for node in weighted:
            self._decide(node)
        quantized = [node for node in weighted if str(node.target) not in self.kept_float]
        matmuls = self._matmuls()
        pending: list[tuple[fx.Node, fx.Node]] = [(node, inputs_of(node)[0]) for node in quantized]
        pending += [(node, operand) for node in matmuls for operand in inputs_of(node)]
        expanded: set[fx.Node] = set()
        while pending:
            reader, tensor = pending.pop(0)
            sources = list(dict.fromkeys(self._walk(reader, tensor)))
            for source in sources:
                self._union(sources[0], source)
                if source not in expanded:
                    expanded.add(source)
                    pending += self._arithmetic_demands(source)
        groups = self._groups(quantized)
        self._check_policy(groups)
        owner = {layer: group for group in reversed(groups) for layer in group.layers}
        layers = dict.fromkeys(str(node.target) for node in quantized)
        edges = {str(node.target) for node in quantized if self._is_edge(node)}
        weights = tuple(self._weight_site(layer, owner[layer], layer in edges) for layer in layers)
        sites = tuple(self._matmul_site(node, groups) for node in matmuls)
        return Placement(tuple(groups), weights, self.kept_float, self.concats, sites)

    def _check_policy(self, groups: list[Group]) -> None:
        layers = [str(node.target) for node in self.nodes if self.kinds[node] is Kind.WEIGHTED]
        layers += [self.paths[node] for node in self.nodes if self.kinds[node] is Kind.MATMUL]
        concats = [self.paths[node] for node in self.nodes if self.kinds[node] is Kind.CONCAT]
        producers = [
            self.paths[node]
            for node in self.nodes
            if self.kinds[node] in {Kind.FLOAT, Kind.ADD, Kind.AVERAGE, Kind.MATMUL}
        ]
        self.policy.check(
            layers, producers + [site.name for group in groups for site in group.tensors], concats
        )

    # -- which layers

    def _decide(self, node: fx.Node) -> None:
        """Note a layer that stays float; one that is called several times does so if any call says so."""
        path = str(node.target)
        tensors = [self.paths[source] for source in self._peek(inputs_of(node)[0])]
        rule = self.policy.decisive("keep_float", [path, *tensors])
        reason = None
        if rule is not None:
            reason = f"policy rule {rule.match}" if rule.keep_float else None
        elif not self.options.quantize_outputs and self._is_output(node):
            reason = "its result leaves the network"
        elif self.options.grid == FP8 and self._reads_input(node) and not self.policy.lookup("grid", tensors):
            reason = "reads the network's input, for which FP8 is too coarse"
        elif not self.options.quantize_narrow:
            is_fp8 = (self.policy.lookup("grid", tensors) or self.options.grid) == FP8
            reason = self._unsupported(node, is_fp8) or self._narrow(node)
        if reason:
            self.kept_float[path] = reason

    def _matmuls(self) -> list[fx.Node]:
        """Products of two tensors that are quantized; notes the reason of each other one."""
        found = []
        for node in self.nodes:
            if self.kinds[node] is not Kind.MATMUL:
                continue
            path = self.paths[node]
            tensors = [self.paths[s] for operand in inputs_of(node) for s in self._peek(operand)]
            rule = self.policy.decisive("keep_float", [path, *tensors])
            reason = None
            if rule is not None:
                reason = f"policy rule {rule.match}" if rule.keep_float else None
            elif self.options.attention == "float":
                reason = "a product of two tensors"
            elif not self.options.quantize_outputs and self._is_output(node):
                reason = "its result leaves the network"
            if reason:
                self.kept_float[path] = reason
            else:
                found.append(node)
        return found

    def _is_output(self, node: fx.Node) -> bool:
        """Whether the result is an answer of the network.

        It is where it leaves as it is (reshaped or joined at most), and where it leaves through anything without
        weights (an activation, say) and no other layer reads it: a feature that is returned as well is not an answer.
        """
        unchanged = {Kind.TRANSPARENT, Kind.CONCAT}
        if self._readers_behind(node, unchanged)[0]:
            return True
        leaves, is_read = self._readers_behind(node, set(Kind) - {Kind.WEIGHTED})
        return leaves and not is_read

    def _readers_behind(self, node: fx.Node, passing: set[Kind]) -> tuple[bool, bool]:
        """Whether the network's output, and whether a weighted layer, is reached through nodes of these kinds."""
        frontier = list(node.users)
        seen = set(frontier)
        leaves = read = False
        while frontier:
            user = frontier.pop()
            leaves |= user.op == "output"
            read |= self.kinds[user] is Kind.WEIGHTED
            if self.kinds[user] in passing:
                fresh = [reader for reader in user.users if reader not in seen]
                seen.update(fresh)
                frontier += fresh
        return leaves, read

    def _unsupported(self, node: fx.Node, is_fp8: bool) -> str | None:
        """Why no engine runs a layer in 8 bits, see `core.operators.unsupported_reason`."""
        layer = self.modules[str(node.target)]
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            return None
        return unsupported_reason(layer.kernel_size, isinstance(layer, nn.ConvTranspose2d), is_fp8)

    def _narrow(self, node: fx.Node) -> str | None:
        """Why a convolution is too narrow for INT8, see `core.operators.narrow_reason`."""
        layer = self.modules[str(node.target)]
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            return None
        reason = narrow_reason(
            layer.in_channels, layer.out_channels, layer.groups, layer.kernel_size, self._reads_input(node)
        )
        return reason and f"narrow: {reason}"

    # -- which tensors

    def _peek(self, tensor: fx.Node) -> Iterator[fx.Node]:
        """Producers of a tensor, through every transparent node and concat."""
        if self.kinds[tensor] in {Kind.TRANSPARENT, Kind.CONCAT}:
            for operand in inputs_of(tensor):
                yield from self._peek(operand)
        else:
            yield tensor

    def _walk(self, reader: fx.Node, tensor: fx.Node) -> Iterator[fx.Node]:
        """Producers whose scale the reader sees; records who reads what."""
        if self._passes(tensor):
            for operand in inputs_of(tensor):
                yield from self._walk(tensor, operand)
        else:
            self.edges.setdefault(tensor, set()).add(reader)
            yield tensor

    def _passes(self, node: fx.Node) -> bool:
        if self.kinds[node] is Kind.TRANSPARENT:
            return True
        if self.kinds[node] is not Kind.CONCAT:
            return False
        path = self.paths[node]
        if path not in self.concats:
            said = self.policy.lookup("share", [path])
            self.concats[path] = self.options.share_concat_scales if said is None else bool(said)
        return self.concats[path]

    def _arithmetic_demands(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """(reader, operand) for each operand that an arithmetic producer reads in INT8."""
        if self.kinds[node] is Kind.AVERAGE:
            demands = [(node, operand) for operand in inputs_of(node)]
        else:
            total = self._sum_behind(node)
            demands = self._sum_demands(total) if total is not None else []
        return [(reader, operand) for reader, operand in demands if not self._stays_float(operand)]

    def _sum_behind(self, node: fx.Node) -> fx.Node | None:
        """The sum that makes a tensor, by itself or under an activation that nothing comes in between."""
        if self.kinds[node] is Kind.ADD:
            return node
        inputs = node.all_input_nodes
        if self.kinds[node] is Kind.FLOAT and len(inputs) == 1 and len(inputs[0].users) == 1:
            return inputs[0] if self.kinds[inputs[0]] is Kind.ADD else None
        return None

    def _sum_demands(self, total: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Every operand but the one that is fused with the sum; in a chain of sums, those of the inner ones, too."""
        operands = inputs_of(total)
        branch = fused_summand(self, operands)
        demands = [(total, operand) for operand in operands if operand is not branch]
        if branch is not None and self.kinds[branch] is Kind.ADD:
            demands = self._sum_demands(branch) + demands
        return demands

    def _stays_float(self, operand: fx.Node) -> bool:
        return (
            self.policy.lookup("keep_float", [self.paths[source] for source in self._peek(operand)]) is True
        )

    # -- what `fused_summand` asks of the graph

    def kind(self, tensor: fx.Node) -> Kind:
        """Kind of a node."""
        return self.kinds[tensor]

    def sources(self, tensor: fx.Node) -> list[fx.Node]:
        """Nodes that a node reads."""
        return tensor.all_input_nodes

    def num_readers(self, tensor: fx.Node) -> int:
        """How many nodes read a node."""
        return len(tensor.users)

    # -- groups

    def _find(self, node: fx.Node) -> fx.Node:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _union(self, a: fx.Node, b: fx.Node) -> None:
        roots = sorted((self._find(a), self._find(b)), key=self.order.__getitem__)
        self.parent[roots[1]] = roots[0]

    def _groups(self, quantized: list[fx.Node]) -> list[Group]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for producer in sorted(self.edges, key=self.order.__getitem__):
            members.setdefault(self._find(producer), []).append(producer)
        layers: dict[fx.Node, list[str]] = {root: [] for root in members}
        for node in quantized:
            source = next(iter(self._walk(node, inputs_of(node)[0])))
            layers[self._find(source)].append(str(node.target))
        return [self._group(tensors, layers[root]) for root, tensors in members.items()]

    def _group(self, tensors: list[fx.Node], layers: list[str]) -> Group:
        names = [self.paths[node] for node in tensors]
        sites = tuple(TensorSite(self.paths[node], node.name, self._readers(node)) for node in tensors)
        options = self.options
        reads_input = any(node.op == "placeholder" for node in tensors)
        bits = max(options.activation_bits, options.edge_bits if reads_input else 0)
        grid = FP8_E4M3
        if (self.policy.lookup("grid", names) or options.grid) == INTEGER:
            grid = Grid(
                bits=self.policy.lookup("bits", names) or bits,
                signed=not (options.unsigned and all(self._is_nonnegative(node) for node in tensors)),
            )
        return Group(
            name=names[0],
            tensors=sites,
            layers=tuple(dict.fromkeys(layers)),
            grid=grid,
            observer=self.policy.lookup("observer", names),
            scale=self.policy.lookup("scale", names),
        )

    def _matmul_site(self, node: fx.Node, groups: list[Group]) -> MatmulSite:
        feeding = {site.node: group.name for group in groups for site in group.tensors}
        first, second = (feeding[next(self._walk(node, operand)).name] for operand in inputs_of(node))
        return MatmulSite(self.paths[node], node.name, (first, second))

    def _is_nonnegative(self, node: fx.Node) -> bool:
        """Whether no value of a tensor can be below 0, images being in [0, 1]."""
        if self.kinds[node] in {Kind.TRANSPARENT, Kind.CONCAT, Kind.ADD, Kind.AVERAGE}:
            return all(self._is_nonnegative(source) for source in inputs_of(node))
        return node.op == "placeholder" or is_nonnegative(node, self.modules)

    def _readers(self, producer: fx.Node) -> tuple[str, ...]:
        return tuple(node.name for node in sorted(self.edges[producer], key=self.order.__getitem__))

    def _is_edge(self, node: fx.Node) -> bool:
        """Whether a layer reads the network's input or makes its output."""
        return self._reads_input(node) or self._is_output(node)

    def _reads_input(self, node: fx.Node) -> bool:
        return any(source.op == "placeholder" for source in self._peek(inputs_of(node)[0]))

    def _weight_site(self, path: str, group: Group, is_edge: bool) -> WeightSite:
        layer = self.modules[path]
        assert isinstance(layer, WEIGHTED_MODULES)
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        options = self.options
        bits = self.policy.lookup("bits", [path]) or max(
            options.weight_bits, options.edge_bits if is_edge else 0
        )
        grid = FP8_WEIGHTS if group.grid.is_fp8 else Grid(bits, symmetric=True)  # one kind for both factors
        return WeightSite(path, axis, grid, group.name)
