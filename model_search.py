"""The mixed-op supernet of DARTS as a static program, compiled once.

A cell, edge by edge (tests/reference/supernet.py is this definition as a program):

    states = [preprocess0(s0), preprocess1(s1)]
    for node in range(space.nodes):
        total = 0
        for j, state in enumerate(states):                          # 14 edges in all with 4 nodes
            weights = softmax(alpha[edge])                          # alpha of this kind of cell, [edges, primitives]
            total += sum(weights[k] * operation[edge, k](state) for k in range(len(space.primitives)))
            edge += 1
        states.append(total)
    return concat(states[2:])

The same function, batched, in a fraction of the operators:

    edge by edge                                  | batched
    ----------------------------------------------|--------------------------------------------------------------
    a weight per operation and edge               | one vector theta; groups of equal shape are neighbours in it
    a depthwise convolution per edge              | one over the concatenated channels of all edges from a state
    a 1x1 convolution per edge                    | one grouped convolution, a group per edge
    a batch normalisation per edge, times softmax | one over all channels, with softmax(alpha) as its scale
    a pool per edge                               | one per state: pools have no weights
    a weighted sum over pools and skip_connect    | one 1x1 convolution whose kernel is softmax(alpha)

With partial channels (PC-DARTS, arXiv 1907.05737) only the first C / K channels of a state pass the mixed operation:

    operated, rest = state[:, :C // K], state[:, C // K:]           # with stride 2 the rest is max-pooled 2x2
    edge = shuffle(concat(mixed operation(operated), rest))         # K groups of channels, interleaved
    node = sum(softmax(beta)[edge] * edge for its edges)            # a softmax over the edges of each node

The shuffle is linear, so the edges of a group of states are summed first, with softmax(alpha) * softmax(beta) as
mixing weights and softmax(beta) as weights of the rest, and shuffled once.

The supernet is a pure function (theta, alphas, images, labels) -> loss, top-1, top-5, gradients; alphas is the vector
of all architecture parameters: alpha, [edges, primitives] per kind of cell, and beta, [edges], with partial channels.
The space is data: genotypes.SearchSpace names the primitives, and operations.OPERATIONS defines them. On the CPU a
compiled operator computes a cell, where it is available (engine/custom_ops). tests/test_model_search.py compares both
ways with the edge-by-edge reference.
"""
from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

import engine  # noqa: F401  before paddle
import paddle
import paddle.nn.functional as F

from engine import custom_ops
from engine.network import Evaluation, FlatNetwork
from engine.parameters import ArrangedTable, FlatParameters
from engine.programs import StaticProgram
from genotypes import DARTS_SPACE, Genotype, SearchSpace, derive
from operations import (BN_EPSILON, OPERATIONS, FactorizedReduce, ReLUConvBN, States, Stem, batch_norm,
                        check_known, conv, linear, mean_of_planes, not_compiled)
from utils import UserError

CELL_KINDS = 'normal', 'reduce'

Gradients = namedtuple('Gradients', 'loss top1 top5 weights alphas')


def mixing_weights(alphas):
    """Returns the mixing weights of logits [..., n], in the program under construction: of the n operations on an edge,
    or of the n edges of a node. The supernet, the derivation of the genotype and the log use this function alone.
    """
    return F.softmax(alphas, axis=-1)


class ArchitectureParameters(FlatParameters):
    """The layout of the vector of architecture parameters: alphas_{normal,reduce} [edges, primitives] and, with
    partial channels, betas_{normal,reduce} [edges].
    """

    def __init__(self, space: SearchSpace, partial_channels: int):
        super().__init__()
        self.space, self.betas = space, None
        self.alphas = self.declare([f'alphas_{kind}' for kind in CELL_KINDS], [space.edges, len(space.primitives)])
        if partial_channels > 1:
            self.betas = self.declare([f'betas_{kind}' for kind in CELL_KINDS], [space.edges])
        self.assign_offsets()

    def weights(self, vector) -> list:
        """Returns the weights of the operations on each edge, [2 * edges, primitives] for both kinds of cell, and with
        partial channels those of the edges, [2 * edges, 1], in the program under construction.
        """
        self.unpack(vector)
        weights = [mixing_weights(self.alphas.tensor)]
        if self.betas:
            by_node = paddle.split(paddle.reshape(self.betas.tensor, [len(CELL_KINDS), -1]),
                                   [2 + node for node in range(self.space.nodes)], axis=1)
            edges = paddle.concat([mixing_weights(betas) for betas in by_node], axis=1)
            weights.append(paddle.reshape(edges, [-1, 1]))
        return weights

    def tables(self, vector) -> list:
        """Returns the mixing weights of each kind of cell [edges, primitives], with partial channels multiplied by the
        weights of the edges, which are one more column then.
        """
        table, *edges = self.weights(vector)
        if edges:
            table = paddle.concat([table * edges[0], edges[0]], axis=1)
        return paddle.split(table, len(CELL_KINDS), axis=0)


def add_up(summands: list):
    return paddle.add_n(summands) if len(summands) > 1 else summands[0]


class MixedOps:
    """The mixed operations on all edges that leave a group of states.

    An edge is sum_k w_k op_k(state) with the mixing weights w. The edges are computed together, ordered by node, then
    by state. partial_channels: K; the operations have channels / K channels.
    """

    def __init__(self, layout: FlatParameters, mixing: ArrangedTable, space: SearchSpace, prefix: str, states: tuple,
                 channels: int, reduction: bool, partial_channels: int):
        self.partial_channels, channels = partial_channels, channels // partial_channels
        self.states, self.channels = len(states), channels
        self.stride = stride = 2 if reduction and max(states) < 2 else 1
        nodes = [node for node in range(space.nodes) if 2 + node > max(states)]
        self.nodes = len(nodes)
        edges = [space.first_edges[node] + state for node in nodes for state in states]
        entries = [OPERATIONS[name] for name in space.primitives]
        # Columns of alpha: operations with weights, those that are the identity with another stride last; pools; the
        # identity. The rest is zero.
        weighted = sorted((k for k, entry in enumerate(entries) if entry.has_weights(stride)),
                          key=lambda k: entries[k].identity)
        pools = [k for k, entry in enumerate(entries) if entry.pool]
        identities = [k for k, entry in enumerate(entries) if entry.is_identity(stride)]
        self.pools, self.identities = [entries[k].pool for k in pools], len(identities)

        # The mixing weights enter as the scale of every channel of the BN that ends an operation with weights, and as a
        # kernel that mixes the results without weights into [nodes] outputs.
        self.ops = []                              # (function, whether it ends in a BN, position in the scales)
        for k in weighted:
            names = [f'{prefix}._ops.{edge}._ops.{k}' for edge in edges]
            function = entries[k].build(layout, names, channels, stride, affine=False)
            self.ops.append((function, entries[k].ends_in_norm, mixing.add_scales([(edge, k) for edge in edges])))
        self.mix = None
        if pools + identities:
            self.mix = mixing.add_kernel(len(nodes), [
                (space.first_edges[node] + state, k)
                for node in nodes for k in pools + identities for state in states])
        if partial_channels > 1:
            self.rest = mixing.add_kernel(len(nodes), [(space.first_edges[node] + state, len(space.primitives))
                                                       for node in nodes for state in states])

    def __call__(self, x, scales: list):
        """x: the states side by side [N, states * C, H, W]; scales: `ArrangedTable.scales` for this cell.

        Returns summands, each [N, nodes * C, H', W'].
        """
        if self.partial_channels == 1:
            return self._operate(x, scales)
        height, width = x.shape[2:]
        parts = paddle.split(paddle.reshape(x, [0, self.states, self.partial_channels, self.channels * height * width]),
                             [1, self.partial_channels - 1], axis=2)
        x, rest = (paddle.reshape(part, [0, self.states * part.shape[2] * self.channels, height, width])
                   for part in parts)
        if self.stride == 2:
            rest = F.max_pool2d(rest, 2, 2)
        height, width = height // self.stride, width // self.stride
        rest = conv(paddle.reshape(rest, [0, self.states, rest.shape[1] // self.states * height, width]), self.rest)
        operated = paddle.reshape(add_up(self._operate(x, scales)), [0, self.nodes, self.channels * height, width])
        x = paddle.reshape(paddle.concat([operated, rest], axis=2),
                           [0, self.nodes, self.partial_channels, self.channels, height * width])
        x = paddle.transpose(x, [0, 1, 3, 2, 4])
        return [paddle.reshape(x, [0, self.nodes * self.partial_channels * self.channels, height, width])]

    def _operate(self, x, scales: list):
        """Returns the sums over the operations and the states, as summands, of the channels that pass them."""
        height, width = (size // self.stride for size in x.shape[2:])
        summands = self._with_weights(States(x, self.nodes), scales)         # [N, nodes * states * C, H', W']
        if self.states > 1 and summands:
            by_state = paddle.reshape(add_up(summands), [0, self.nodes, self.states, self.channels * height * width])
            summands = [paddle.reshape(paddle.sum(by_state, axis=2), [0, self.nodes * self.channels, height, width])]
        if self.mix:
            parts = [x] * self.identities
            if self.pools:
                pools = [pool(x, self.stride) for pool in self.pools]
                parts = [batch_norm(paddle.concat(pools, axis=1) if len(pools) > 1 else pools[0]), *parts]
            x = paddle.concat(parts, axis=1) if len(parts) > 1 else parts[0]           # [N, ops * states * C, H', W']
            # A 1x1 convolution over the operations: [N, ops * states, C * H', W'] -> [N, nodes, C * H', W'].
            mixed = conv(paddle.reshape(x, [0, self.mix.shape[1], self.channels * height, width]), self.mix)
            summands.append(paddle.reshape(mixed, [0, self.nodes * self.channels, height, width]))
        return summands

    def _with_weights(self, states: States, scales: list) -> list:
        results = []
        for function, ends_in_norm, position in self.ops:
            if ends_in_norm:
                results.append(function(states, scales[position]))
            else:
                results.append(function(states) * paddle.reshape(scales[position], [1, -1, 1, 1]))
        return results


class Cell:
    """A cell of the supernet: (s0, s1), the outputs of the two cells before, -> [N, nodes * C, H', W']."""

    def __init__(self, layout: FlatParameters, mixing: ArrangedTable, space: SearchSpace, prefix: str,
                 c_prev_prev: int, c_prev: int, channels: int, reduction: bool, reduction_prev: bool,
                 partial_channels: int):
        self.space, self.channels, self.reduction, self.mixing = space, channels, reduction, mixing
        self.partial_channels = partial_channels
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(layout, [f'{prefix}.preprocess0'], c_prev_prev, channels, affine=False)
        self.preprocess1 = ReLUConvBN(layout, [f'{prefix}.preprocess1'], c_prev, channels, affine=False)
        first = len(layout.groups)
        self.mixed = [MixedOps(layout, mixing, space, prefix, states, channels, reduction, partial_channels)
                      for states in space.state_groups]
        self.weights = list(layout.fused_views(first).values())      # for the compiled operator, a tensor per shape

    def __call__(self, s0, s1, mixing, weight_gradients: bool, constant_states: int):
        """mixing: table of mixing weights of this kind of cell for the compiled operator, or None.

        weight_gradients: whether the gradients of the weights are needed; constant_states: the number of the first
        inputs whose gradients are not needed either.
        """
        if mixing is not None:
            return self.as_compiled_operators(s0, s1, mixing, weight_gradients, constant_states)
        return self.batched(batch_norm(paddle.concat([self.preprocess0.convolve(s0), self.preprocess1.convolve(s1)],
                                                     axis=1)))

    def as_compiled_operators(self, s0, s1, mixing, weight_gradients: bool, constant_states: int):
        """Adds the cell as two compiled operators."""
        kernels = [kernel.tensor for kernel in self.preprocess0.kernels + self.preprocess1.kernels]
        x = custom_ops.preprocessing(s0, s1, kernels, weight_gradients, constant_states, BN_EPSILON)
        return custom_ops.mixed_cell(x, mixing, [view.tensor for view in self.weights], self.space.primitives,
                                     self.space.nodes, self.reduction, self.partial_channels, weight_gradients,
                                     constant_states, BN_EPSILON)

    def batched(self, x):
        """Adds the mixed operations of both input states x [N, 2 * C, H, W], batched by groups of states."""
        scales = self.mixing.scales(self.channels // self.partial_channels)
        nodes, sums = [], []          # sums: contributions of the states so far to the incomplete nodes
        for mixed in self.mixed:
            x, sums = add_up(mixed(x, scales) + sums), []
            if mixed.nodes > 1:
                x, rest = paddle.split(x, [self.channels, (mixed.nodes - 1) * self.channels], axis=1)
                sums = [rest]
            nodes.append(x)
        return paddle.concat(nodes, axis=1)


class Supernet(FlatNetwork):
    """The supernet on one device, with its weights and its alpha.

    channels: C of the first cell, even; classes: their number; layers: the number of cells, at least 3; dtype:
    'float32' or 'float64'; seed: of the initial weights and alpha; image_size: height and width, a multiple of 4;
    space: the primitives on each edge and the number of nodes; partial_channels: K, the operations on an edge have
    channels / K channels (1: DARTS); place: the device, the CPU when None;
    build_programs=False builds no program, for names and shapes only; max_size: largest number of weights for which
    memory is reserved, for sizes from a file. Raises UserError for sizes that cannot be built or exceed max_size, and
    for a primitive that operations.OPERATIONS lacks.

    The weights are the vector `theta` of the store, the architecture parameters the vector `alphas` with the layout
    `architecture`; `run` leaves the gradients of both in `gradient` and `alpha_gradient`, on the device.

    Batch normalisation uses the statistics of the batch, in validation too: alpha rescales the activations in every
    step, and running statistics would lag behind.

    >>> import numpy as np
    >>> from architect import Architect
    >>> from genotypes import SearchSpace
    >>> from model_search import Supernet
    >>> space = SearchSpace(('none', 'skip_connect', 'sep_conv_3x3'), nodes=4)             # default: DARTS_SPACE
    >>> supernet = Supernet(channels=4, classes=10, layers=3, dtype='float64', image_size=8, space=space)
    >>> rng = np.random.default_rng(0)
    >>> train, valid = [(rng.normal(size=(6, 3, 8, 8)), rng.integers(0, 10, (6, 1))) for _ in range(2)]

    Weights and alpha go in and come out by the names of the authors' PyTorch implementation:

    >>> weights = supernet.weights()
    >>> weights['cells.0._ops.3._ops.2.op.1.weight'].shape
    (4, 1, 3, 3)
    >>> supernet.set_weights({'stem.0.weight': weights['stem.0.weight'] / 2})
    >>> supernet.set_alphas({'alphas_normal': np.zeros((14, 3)), 'alphas_reduce': np.zeros((14, 3))})

    Loss and gradients of a batch:

    >>> result = supernet.gradients(*train)
    >>> result.weights['classifier.bias'].shape, result.alphas['alphas_reduce'].shape
    ((10,), (14, 3))

    One step of the architect, and the gradient of alpha that it took:

    >>> architect = Architect(supernet)
    >>> architect.step(train, valid, lr=0.025)
    >>> architect.alpha_gradients()['alphas_normal'].shape
    (14, 3)
    >>> supernet.genotype().normal_concat
    (2, 3, 4, 5)
    """

    def __init__(self, channels: int = 16, classes: int = 10, layers: int = 8, dtype: str = 'float32', seed: int = 0,
                 image_size: int = 32, space: SearchSpace = DARTS_SPACE, partial_channels: int = 1, place=None,
                 build_programs: bool = True, max_size: float = math.inf):
        if layers < 3:
            raise UserError(f"layers is {layers}, but two reduction cells after the first cell need at least 3")
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels is {channels}, but has to be even and positive: "
                            "the output of FactorizedReduce consists of two halves")
        if partial_channels < 1 or channels % partial_channels:
            raise UserError(f"partial_channels is {partial_channels}, but has to divide init_channels, {channels}: "
                            "the operations on an edge have init_channels / partial_channels channels")
        if image_size < 4 or image_size % 4:
            raise UserError(f"images of {image_size} x {image_size} cannot be halved twice")
        check_known(space.primitives)
        super().__init__(classes, image_size, FlatParameters())
        self.space, self.partial_channels = space, partial_channels
        self.architecture = ArchitectureParameters(space, partial_channels)
        columns = len(space.primitives) + (partial_channels > 1)
        self.mixing = [ArrangedTable(space.edges, columns) for _ in CELL_KINDS]      # cells of a kind share one
        self.compiled = build_programs and custom_ops.enabled_for(not_compiled(space.primitives))
        c_prev_prev = c_prev = 3 * channels
        self.stem = Stem(self.layout, c_prev)
        self.cells, reduction_prev = [], False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            self.cells.append(Cell(self.layout, self.mixing[reduction], space, f'cells.{i}', c_prev_prev, c_prev,
                                   channels, reduction, reduction_prev, partial_channels))
            c_prev_prev, c_prev, reduction_prev = c_prev, space.nodes * channels, reduction
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes], bound=c_prev ** -0.5)

        size = self.layout.count()
        if size > max_size:
            raise UserError(f"a supernet of {space}, init_channels {self.cells[0].channels} and {layers} layers has "
                            f"{size} weights, more than the {max_size} expected")
        rng = np.random.default_rng(seed)
        self._allocate(place, dtype, rng)
        self.store.set('alphas', rng.normal(0, 1e-3, self.architecture.size), saved=True)
        self.store.set('alpha_gradient', np.zeros(self.architecture.size))
        if not build_programs:
            return
        if not self.compiled:
            for kind, mixing in zip(CELL_KINDS, self.mixing):
                self.store.set(f'permutation_{kind}', mixing.permutation)
        self._run = StaticProgram(self.store, lambda: self._build(['theta', 'alphas']))
        self._evaluate = StaticProgram(self.store, lambda: self._build([]))
        self._run_alphas = self._run             # Paddle's operators always compute all gradients
        if self.compiled:
            self._run_alphas = StaticProgram(self.store, lambda: self._build(['alphas']))
        self._mixing_weights = StaticProgram(
            self.store, lambda: self.architecture.weights(self.store.variable('alphas')))

    def _build(self, differentiated: list[str]) -> list:
        """Builds a program with the gradients of the vectors `differentiated`, which fetches nothing."""
        store = self.store
        images, labels = self._inputs()
        theta, alphas = store.variable('theta', trainable=True), store.variable('alphas', trainable=True)
        logits = self._logits(images, theta, alphas, weight_gradients='theta' in differentiated)
        loss = F.cross_entropy(logits, labels)
        if differentiated:
            # Always of both: Paddle 2.6 requires all outputs of a compiled operator.
            gradients = dict(zip(('theta', 'alphas'), paddle.static.gradients([loss], [theta, alphas])))
            for name in differentiated:
                store.assign({'theta': 'gradient', 'alphas': 'alpha_gradient'}[name], gradients[name])
        self._assign_metrics(loss, logits, labels)
        return []

    def _logits(self, images, theta, alphas, weight_gradients: bool):
        self.layout.unpack(theta, fused=self.compiled)
        tables = self.architecture.tables(alphas)
        if not self.compiled:
            for kind, mixing, table in zip(CELL_KINDS, self.mixing, tables):
                mixing.unpack(table, self.store.variable(f'permutation_{kind}'))
            tables = [None, None]          # self.mixing holds them
        s0 = s1 = self.stem(images, self.compiled, weight_gradients)
        for i, cell in enumerate(self.cells):
            # The stem does not depend on alpha. It is both inputs of the first cell and one of the second.
            constant_states = 0 if weight_gradients else max(0, 2 - i)
            s0, s1 = s1, cell(s0, s1, tables[cell.reduction], weight_gradients, constant_states)
        return linear(mean_of_planes(s1), self.classifier, self.classifier_bias)

    def run(self, feed: dict) -> Evaluation:
        """Returns loss and accuracies of a batch from `feed`; leaves both gradients on the device."""
        self.compute_gradients(feed)
        return self._metrics()

    def compute_gradients(self, feed: dict) -> None:
        """Like `run`, but copies nothing from the device: the host does not wait for it."""
        self._run(**feed)

    def compute_alpha_gradient(self, feed: dict) -> None:
        """Like `compute_gradients`, but guarantees only the gradient of alpha."""
        self._run_alphas(**feed)

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """Returns mean loss, top-1 and top-5 accuracy (fractions) of a batch; leaves the gradients unchanged."""
        self._evaluate(**self.feed(images, labels))
        return self._metrics()

    def gradients(self, images: np.ndarray, labels: np.ndarray) -> Gradients:
        """Returns loss, accuracies and the gradients by name: weights {name: array}, and alphas as of `alphas`."""
        evaluation = self.run(self.feed(images, labels))
        return Gradients(*evaluation, self.layout.named(self.store.get('gradient')),
                         self.architecture.named(self.store.get('alpha_gradient')))

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets all weights, and all architecture parameters if one of them is given, from {name: array}.

        Raises UserError for a weight or parameter that is missing, unknown or of a wrong shape.
        """
        alphas = {name: array for name, array in weights.items() if name.startswith(('alphas_', 'betas_'))}
        weights = {name: array for name, array in weights.items() if name not in alphas}
        self.check_complete(weights)
        missing = [name for name in self.architecture.shapes if alphas and name not in alphas]
        if missing:
            raise UserError(f"{missing[0]} is missing, {', '.join(alphas)} is given")
        self.set_weights(weights)
        self.set_alphas(alphas)

    def alphas(self) -> dict[str, np.ndarray]:
        """Returns the architecture parameters {'alphas_normal', 'alphas_reduce': [edges, primitives]}, logits, and with
        partial channels {'betas_normal', 'betas_reduce': [edges]}.
        """
        return self.architecture.named(self.store.get('alphas'))

    def set_alphas(self, alphas: dict[str, np.ndarray]) -> None:
        """Sets some or all of `alphas`; raises UserError for an unknown name or a wrong shape."""
        for name in alphas:
            if name not in self.architecture.shapes:
                raise UserError(f"unknown alpha {name!r}: there are {', '.join(self.architecture.shapes)}")
        self.store.set('alphas', self.architecture.flat(alphas, self.store.get('alphas')))

    def mixing_weights(self) -> dict[str, np.ndarray]:
        """Returns the weights of operations and edges that the current `alphas` mean, with their names and shapes."""
        return self.architecture.named(np.concatenate([weights.reshape(-1) for weights in self._mixing_weights()]))

    def genotype(self) -> Genotype:
        """Returns the genotype of the current `alphas`. The weight of an edge multiplies those of its operations."""
        weights = self.mixing_weights()
        return derive(self.space, *(
            weights[f'alphas_{kind}'] * weights.get(f'betas_{kind}', np.ones(self.space.edges))[:, None]
            for kind in CELL_KINDS))
