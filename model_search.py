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

The supernet is a pure function (theta, alphas, images, labels) -> loss, top-1, top-5, gradients; alphas is
[2, edges, primitives] for both kinds of cell. The space is data: genotypes.SearchSpace names the primitives, and
operations.OPERATIONS defines them. On the CPU a compiled operator computes a cell, where it is available
(engine/custom_ops). tests/test_model_search.py compares both ways with the edge-by-edge reference.
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
from engine.parameters import FlatParameters, ParameterGroup, check_finite, split
from engine.programs import StaticProgram
from genotypes import DARTS_SPACE, Genotype, SearchSpace, derive
from operations import (BN_EPSILON, OPERATIONS, BatchNorm, FactorizedReduce, ReLUConvBN, States, batch_norm,
                        check_known, conv, linear, mean_of_planes, not_compiled)
from utils import UserError

CELL_KINDS = ('normal', 'reduce')           # the first axis of alphas

Gradients = namedtuple('Gradients', 'loss top1 top5 weights alphas')


def mixing_weights(alphas):
    """Returns the mixing weights of the operations on each edge, in the program under construction.

    alphas: logits [..., primitives]. The supernet, the derivation of the genotype and the log use this function alone.
    """
    return F.softmax(alphas, axis=-1)


def add_up(summands: list):
    return paddle.add_n(summands) if len(summands) > 1 else summands[0]


class MixingWeights:
    """The mixing weights of one kind of cell, arranged for the operations of `MixedOps`.

    The cells of a kind share them. An arrangement takes every entry of the table once, so it is the product with a
    permutation matrix, `permutation`. The gradient of a gather would add atomically on GPUs, in a different order, and
    so with a different rounding, in every run.
    """

    def __init__(self, space: SearchSpace):
        self.shape = space.edges, len(space.primitives)
        self._scales: dict[tuple, int] = {}        # {entries (edge, primitive): number}
        self._kernels: dict[tuple, ParameterGroup] = {}

    def add_scales(self, entries: list[tuple]) -> int:
        """Declares entries (edge, primitive) as scales of channels; returns the position of the group in `scales`."""
        return self._scales.setdefault(tuple(entries), len(self._scales))

    def add_kernel(self, nodes: int, entries: list[tuple]) -> ParameterGroup:
        """Declares entries (edge, primitive) as a 1x1 kernel of [nodes] outputs."""
        kernel = ParameterGroup(1, [nodes, len(entries) // nodes, 1, 1])
        return self._kernels.setdefault(tuple(entries), kernel)

    @property
    def permutation(self) -> np.ndarray:
        """The matrix [entries in use, edges * primitives] of zeros and ones: scales first, then kernels."""
        entries = [entry for group in (*self._scales, *self._kernels) for entry in group]
        return np.eye(math.prod(self.shape))[[edge * self.shape[1] + k for edge, k in entries]]

    def unpack(self, table, permutation) -> None:
        """Gives the kernels their tensors, and `scales` its content, in the program under construction.

        table: mixing weights [edges, primitives]; permutation: a variable with the matrix of that name.
        """
        arranged = paddle.matmul(permutation, paddle.reshape(table, [-1, 1]))
        counts = [sum(map(len, self._scales)), *map(len, self._kernels)]
        pieces = iter(split(arranged, [count for count in counts if count]))
        self._column = next(pieces) if self._scales else None        # [scales, 1]
        for kernel in self._kernels.values():
            kernel.tensor, kernel.positions = paddle.reshape(next(pieces), kernel.shape), 0
        self._by_channels = {}

    def scales(self, channels: int) -> list:
        """Returns all groups of scales for a cell, each scale repeated `channels` times: [entries * channels]."""
        if not self._scales:
            return []
        if channels not in self._by_channels:
            rows = paddle.expand(self._column, [self._column.shape[0], channels])
            self._by_channels[channels] = paddle.reshape(rows, [-1])
        return split(self._by_channels[channels], [len(entries) * channels for entries in self._scales])


class MixedOps:
    """The mixed operations on all edges that leave a group of states.

    An edge is sum_k w_k op_k(state) with the mixing weights w. The edges are computed together, ordered by node, then
    by state.
    """

    def __init__(self, layout: FlatParameters, mixing: MixingWeights, space: SearchSpace, prefix: str, states: tuple,
                 channels: int, reduction: bool):
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

    def __call__(self, x, scales: list):
        """x: the states side by side [N, states * C, H, W]; scales: `MixingWeights.scales` for this cell.

        Returns summands, each [N, nodes * C, H', W'].
        """
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

    def __init__(self, layout: FlatParameters, mixing: MixingWeights, space: SearchSpace, prefix: str,
                 c_prev_prev: int, c_prev: int, channels: int, reduction: bool, reduction_prev: bool):
        self.space, self.channels, self.reduction, self.mixing = space, channels, reduction, mixing
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(layout, [f'{prefix}.preprocess0'], c_prev_prev, channels, affine=False)
        self.preprocess1 = ReLUConvBN(layout, [f'{prefix}.preprocess1'], c_prev, channels, affine=False)
        first = len(layout.groups)
        self.mixed = [MixedOps(layout, mixing, space, prefix, states, channels, reduction)
                      for states in space.state_groups]
        self.weights = list(layout.fused_views(first).values())      # for the compiled operator, a tensor per shape

    def __call__(self, s0, s1, mixing, weight_gradients: bool):
        """mixing: mixing weights [edges, primitives] of this kind of cell for the compiled operator, or None.

        weight_gradients: whether the gradients of the weights are needed.
        """
        x = batch_norm(paddle.concat([self.preprocess0.convolve(s0), self.preprocess1.convolve(s1)], axis=1))
        return self.batched(x) if mixing is None else self.as_one_operator(x, mixing, weight_gradients)

    def as_one_operator(self, x, mixing, weight_gradients: bool):
        """Adds the mixed operations of both input states x [N, 2 * C, H, W] as one compiled operator."""
        return custom_ops.mixed_cell(x, mixing, [view.tensor for view in self.weights], self.space.primitives,
                                     self.space.nodes, self.reduction, weight_gradients, BN_EPSILON)

    def batched(self, x):
        """Adds the mixed operations of both input states x [N, 2 * C, H, W], batched by groups of states."""
        scales = self.mixing.scales(self.channels)
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
    space: the primitives on each edge and the number of nodes; place: the device, the CPU when None;
    build_programs=False builds no program, for names and shapes only; max_size: largest number of weights for which
    memory is reserved, for sizes from a file. Raises UserError for sizes that cannot be built or exceed max_size, and
    for a primitive that operations.OPERATIONS lacks.

    The weights are the vector `theta` of the store, alpha is `alphas` [2, edges, primitives] (normal, reduce); `run`
    leaves the gradients of both in `gradient` and `alpha_gradient`, on the device.

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
                 image_size: int = 32, space: SearchSpace = DARTS_SPACE, place=None, build_programs: bool = True,
                 max_size: float = math.inf):
        if layers < 3:
            raise UserError(f"layers is {layers}, but two reduction cells after the first cell need at least 3")
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels is {channels}, but has to be even and positive: "
                            "the output of FactorizedReduce consists of two halves")
        if image_size < 4 or image_size % 4:
            raise UserError(f"images of {image_size} x {image_size} cannot be halved twice")
        check_known(space.primitives)
        super().__init__(classes, image_size, FlatParameters())
        self.space, self.mixing = space, [MixingWeights(space) for _ in CELL_KINDS]
        self.compiled = build_programs and custom_ops.enabled_for(not_compiled(space.primitives))
        c_prev_prev = c_prev = 3 * channels
        self.stem = self.layout.declare(['stem.0.weight'], [c_prev, 3, 3, 3])
        self.stem_norm = BatchNorm(self.layout, ['stem.1'], c_prev, affine=True)
        self.cells, reduction_prev = [], False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            self.cells.append(Cell(self.layout, self.mixing[reduction], space, f'cells.{i}', c_prev_prev, c_prev,
                                   channels, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, space.nodes * channels, reduction
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes], bound=c_prev ** -0.5)

        size = self.layout.count()
        if size > max_size:
            raise UserError(f"a supernet of {space}, init_channels {self.cells[0].channels} and {layers} layers has "
                            f"{size} weights, more than the {max_size} expected")
        rng = np.random.default_rng(seed)
        self._allocate(place, dtype, rng)
        shape = len(CELL_KINDS), space.edges, len(space.primitives)
        self.store.set('alphas', rng.normal(0, 1e-3, shape), saved=True)
        self.store.set('alpha_gradient', np.zeros(shape))
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
        self._mixing_weights = StaticProgram(self.store, lambda: [mixing_weights(self.store.variable('alphas'))])

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
        weights = mixing_weights(alphas)
        tables = paddle.split(weights, len(CELL_KINDS), axis=0)
        if self.compiled:
            mixing = [paddle.reshape(table, alphas.shape[1:]) for table in tables]
        else:
            mixing = [None, None]          # self.mixing holds it
            for kind, arranged, table in zip(CELL_KINDS, self.mixing, tables):
                arranged.unpack(table, self.store.variable(f'permutation_{kind}'))
        s0 = s1 = self.stem_norm(conv(images, self.stem, padding=1))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mixing[cell.reduction], weight_gradients)
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
        """Returns loss, accuracies and the gradients by name: weights {name: array}, alphas as `alphas`."""
        evaluation = self.run(self.feed(images, labels))
        return Gradients(*evaluation, self.layout.named(self.store.get('gradient')),
                         by_cell_kind(self.store.get('alpha_gradient')))

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets all weights, and both alphas if one of them is given, from {name: array}.

        Raises UserError for a weight or alpha that is missing, unknown or of a wrong shape.
        """
        alphas = {name: array for name, array in weights.items() if name.startswith('alphas_')}
        weights = {name: array for name, array in weights.items() if name not in alphas}
        self.check_complete(weights)
        missing = [name for name in self.alphas() if alphas and name not in alphas]
        if missing:
            raise UserError(f"{missing[0]} is missing, {', '.join(alphas)} is given")
        self.set_weights(weights)
        self.set_alphas(alphas)

    def alphas(self) -> dict[str, np.ndarray]:
        """Returns the logits {'alphas_normal', 'alphas_reduce': [edges, primitives]}."""
        return by_cell_kind(self.store.get('alphas'))

    def set_alphas(self, alphas: dict[str, np.ndarray]) -> None:
        """Sets alpha of one or both kinds of cell; raises UserError for an unknown name or a wrong shape."""
        both = self.store.get('alphas')
        for name, array in alphas.items():
            if name not in self.alphas():
                raise UserError(f"unknown alpha {name!r}: there are {' and '.join(self.alphas())}")
            check_finite(name, np.asarray(array))
            if np.shape(array) != both.shape[1:]:
                raise UserError(f"{name} has shape {list(np.shape(array))}, expected {list(both.shape[1:])}")
            both[list(self.alphas()).index(name)] = array
        self.store.set('alphas', both)

    def mixing_weights(self) -> dict[str, np.ndarray]:
        """Returns the mixing weights of the current alpha: {'alphas_normal', 'alphas_reduce': [edges, primitives]}."""
        return by_cell_kind(self._mixing_weights()[0])

    def genotype(self) -> Genotype:
        """Returns the genotype of the current alpha."""
        return derive(self.space, *self.mixing_weights().values())


def by_cell_kind(alphas: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {'alphas_normal', 'alphas_reduce': [edges, primitives]} of an array [2, edges, primitives]."""
    return {f'alphas_{kind}': array for kind, array in zip(CELL_KINDS, alphas)}
