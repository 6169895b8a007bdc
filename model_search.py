"""The mixed-op supernet of DARTS as a static program, compiled once.

A cell, edge by edge (tests/reference/supernet.py is this definition as a program):

    states = [preprocess0(s0), preprocess1(s1)]
    for node in range(4):
        total = 0
        for j, state in enumerate(states):                         # 14 edges in all
            weights = softmax(alpha[edge])                          # alpha of this kind of cell, [14, 8]
            total += sum(weights[k] * operation[edge, k](state) for k in range(8))
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

The supernet is a pure function (theta, alphas, images, labels) -> loss, top-1, top-5, gradients; alphas is [2, 14, 8]
for both kinds of cell. On the CPU a compiled operator computes a cell, where it is available (engine/custom_ops).
tests/test_model_search.py compares both ways with the edge-by-edge reference.
"""
from __future__ import annotations

from collections import namedtuple

import numpy as np

import engine  # noqa: F401  before paddle
import paddle
import paddle.nn.functional as F

from engine import custom_ops
from engine.network import Evaluation, FlatNetwork
from engine.parameters import FlatBuffer, FlatParameters, check_finite
from engine.programs import StaticProgram
from genotypes import EDGES, FIRST_EDGE, NODES, PRIMITIVES, Genotype, derive, softmax
from operations import (BN_EPSILON, BatchNorm, DilConv, FactorizedReduce, ReLUConvBN, SepConv, States, avg_pool,
                        batch_norm, conv, linear, max_pool, mean_of_planes)
from utils import UserError

# The columns of alpha, in the order of PRIMITIVES.
NONE, MAX_POOL, AVG_POOL, SKIP, SEP_3, SEP_5, DIL_3, DIL_5 = range(len(PRIMITIVES))

# The states of a cell in the groups that are computed together: both inputs are available from the start.
STATE_GROUPS = ((0, 1), (2,), (3,), (4,))

CELL_KINDS = ('normal', 'reduce')           # the first axis of alphas

Gradients = namedtuple('Gradients', 'loss top1 top5 weights alphas')


class MixedOps:
    """The mixed operations on all edges that leave a group of states.

    An edge is sum_k softmax(alpha)_k op_k(state). The edges are computed together, ordered by node, then by state.
    """

    def __init__(self, layout: FlatParameters, mixing: FlatBuffer, prefix: str, states: tuple, channels: int,
                 reduction: bool):
        self.states, self.channels = len(states), channels
        self.stride = 2 if reduction and max(states) < 2 else 1
        nodes = [node for node in range(NODES) if 2 + node > max(states)]
        self.nodes = len(nodes)
        edges = [FIRST_EDGE[node] + state for node in nodes for state in states]

        def names(k: int) -> list[str]:
            return [f'{prefix}._ops.{edge}._ops.{k}' for edge in edges]

        self.ops = {
            SEP_3: SepConv(layout, names(SEP_3), channels, 3, self.stride, affine=False),
            SEP_5: SepConv(layout, names(SEP_5), channels, 5, self.stride, affine=False),
            DIL_3: DilConv(layout, names(DIL_3), channels, 3, self.stride, affine=False),
            DIL_5: DilConv(layout, names(DIL_5), channels, 5, self.stride, affine=False)}
        unweighted = [MAX_POOL, AVG_POOL]
        if self.stride == 2:
            self.ops[SKIP] = FactorizedReduce(layout, names(SKIP), channels, channels, affine=False)
        else:
            unweighted.append(SKIP)

        # softmax(alpha) enters as the scale of every channel of the BN that ends an operation with weights, and as a
        # kernel that mixes the results without weights into [nodes] outputs.
        def entry(edge: int, k: int) -> int:
            return (int(reduction) * EDGES + edge) * len(PRIMITIVES) + k

        self.scales = {k: mixing.add(len(edges), [channels]) for k in self.ops}
        for k, scale in self.scales.items():
            scale.source = np.repeat([entry(edge, k) for edge in edges], channels)
        self.mix = mixing.add(1, [len(nodes), len(unweighted) * len(states), 1, 1])
        self.mix.source = [entry(FIRST_EDGE[node] + state, k)
                           for node in nodes for k in unweighted for state in states]

    def __call__(self, x):
        """x: the states side by side [N, states * C, H, W]; returns summands, each [N, nodes * C, H', W']."""
        states = States(x, self.nodes)
        # Operations with weights, each [N, nodes * states * C, H', W'].
        weighted = [op(states if k != SKIP else states.rectified, self.scales[k].tensor)
                    for k, op in self.ops.items()]

        pools = [max_pool(x, self.stride), avg_pool(x, self.stride)]
        unweighted = batch_norm(paddle.concat(pools, axis=1))
        if self.stride == 1:
            unweighted = paddle.concat([unweighted, x], axis=1)           # [N, 3 * states * C, H, W]
        height, width = unweighted.shape[2:]
        plane = self.channels * height
        # A 1x1 convolution over the operations: [N, ops * states, C * H, W] -> [N, nodes, C * H, W].
        unweighted = conv(paddle.reshape(unweighted, [0, self.mix.shape[1], plane, width]), self.mix)

        if self.states == 1:
            return weighted + [paddle.reshape(unweighted, [0, self.nodes * self.channels, height, width])]
        by_state = paddle.reshape(paddle.add_n(weighted), [0, self.nodes, self.states, plane * width])
        total = paddle.reshape(paddle.sum(by_state, axis=2), [0, self.nodes, plane, width]) + unweighted
        return [paddle.reshape(total, [0, self.nodes * self.channels, height, width])]


class Cell:
    """A cell of the supernet: (s0, s1), the outputs of the two cells before, -> [N, 4 * C, H', W']."""

    def __init__(self, layout: FlatParameters, mixing: FlatBuffer, prefix: str, c_prev_prev: int, c_prev: int,
                 channels: int, reduction: bool, reduction_prev: bool):
        self.channels, self.reduction = channels, reduction
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(layout, [f'{prefix}.preprocess0'], c_prev_prev, channels, affine=False)
        self.preprocess1 = ReLUConvBN(layout, [f'{prefix}.preprocess1'], c_prev, channels, affine=False)
        first = len(layout.groups)
        self.mixed = [MixedOps(layout, mixing, prefix, states, channels, reduction) for states in STATE_GROUPS]
        views = layout.fused_views(first)
        self.views = [views[shape] for shape in ((1, 3, 3), (1, 5, 5), (channels, 1, 1))]

    def __call__(self, s0, s1, mixing, weight_gradients: bool):
        """mixing: softmax(alpha) [14, 8] of this kind of cell; weight_gradients: whether they are needed."""
        x = batch_norm(paddle.concat([self.preprocess0.convolve(s0), self.preprocess1.convolve(s1)], axis=1))
        return self.as_one_operator(x, mixing, weight_gradients) if custom_ops.enabled() else self.batched(x)

    def as_one_operator(self, x, mixing, weight_gradients: bool):
        """Adds the mixed operations of both input states x [N, 2 * C, H, W] as one compiled operator."""
        return custom_ops.mixed_cell(x, *(view.tensor for view in self.views), mixing, self.reduction,
                                     weight_gradients, BN_EPSILON)

    def batched(self, x):
        """Adds the mixed operations of both input states x [N, 2 * C, H, W], batched by groups of states."""
        nodes, sums = [], []          # sums: contributions of the states so far to the incomplete nodes
        for mixed in self.mixed:
            sums = mixed(x) + sums
            total = paddle.add_n(sums) if len(sums) > 1 else sums[0]
            if mixed.nodes == 1:
                x, sums = total, []
            else:
                x, rest = paddle.split(total, [self.channels, (mixed.nodes - 1) * self.channels], axis=1)
                sums = [rest]
            nodes.append(x)
        return paddle.concat(nodes, axis=1)


class Supernet(FlatNetwork):
    """The supernet on one device, with its weights and its alpha.

    channels: C of the first cell, even; classes: their number; layers: the number of cells, at least 3; dtype:
    'float32' or 'float64'; seed: of the initial weights and alpha; image_size: height and width, a multiple of 4;
    place: the device, the CPU when None; build_programs=False builds no program, for names and shapes only.
    Raises UserError for sizes that cannot be built.

    The weights are the vector `theta` of the store, alpha is `alphas` [2, 14, 8] (normal, reduce); `run` leaves the
    gradients of both in `gradient` and `alpha_gradient`, on the device.

    Batch normalisation uses the statistics of the batch, in validation too: alpha rescales the activations in every
    step, and running statistics would lag behind.

    >>> import numpy as np
    >>> from architect import Architect
    >>> from model_search import Supernet
    >>> supernet = Supernet(channels=4, classes=10, layers=3, dtype='float64', image_size=8)
    >>> rng = np.random.default_rng(0)
    >>> train, valid = [(rng.normal(size=(6, 3, 8, 8)), rng.integers(0, 10, (6, 1))) for _ in range(2)]

    Weights and alpha go in and come out by the names of the authors' PyTorch implementation:

    >>> weights = supernet.weights()
    >>> weights['cells.0._ops.3._ops.4.op.1.weight'].shape
    (4, 1, 3, 3)
    >>> supernet.set_weights({'stem.0.weight': weights['stem.0.weight'] / 2})
    >>> supernet.set_alphas({'alphas_normal': np.zeros((14, 8)), 'alphas_reduce': np.zeros((14, 8))})

    Loss and gradients of a batch:

    >>> result = supernet.gradients(*train)
    >>> result.weights['classifier.bias'].shape, result.alphas['alphas_reduce'].shape
    ((10,), (14, 8))

    One step of the architect, and the gradient of alpha that it took:

    >>> architect = Architect(supernet)
    >>> architect.step(train, valid, lr=0.025)
    >>> architect.alpha_gradients()['alphas_normal'].shape
    (14, 8)
    >>> supernet.genotype().normal_concat
    (2, 3, 4, 5)
    """

    def __init__(self, channels: int = 16, classes: int = 10, layers: int = 8, dtype: str = 'float32', seed: int = 0,
                 image_size: int = 32, place=None, build_programs: bool = True):
        if layers < 3:
            raise UserError(f"layers is {layers}, but two reduction cells after the first cell need at least 3")
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels is {channels}, but has to be even and positive: "
                            "the output of FactorizedReduce consists of two halves")
        if image_size < 4 or image_size % 4:
            raise UserError(f"images of {image_size} x {image_size} cannot be halved twice")
        super().__init__(classes, image_size, FlatParameters())
        self.mixing = FlatBuffer()
        c_prev_prev = c_prev = 3 * channels
        self.stem = self.layout.declare(['stem.0.weight'], [c_prev, 3, 3, 3])
        self.stem_norm = BatchNorm(self.layout, ['stem.1'], c_prev, affine=True)
        self.cells, reduction_prev = [], False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            self.cells.append(Cell(self.layout, self.mixing, f'cells.{i}', c_prev_prev, c_prev, channels,
                                   reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, NODES * channels, reduction
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes], bound=c_prev ** -0.5)
        self.mixing.assign_offsets()
        self.mixing_source = np.empty(self.mixing.size, 'int32')         # indices into softmax(alphas)
        for group in self.mixing.groups:
            self.mixing_source[group.offset:group.offset + group.size] = group.source

        rng = np.random.default_rng(seed)
        self._allocate(place, dtype, rng)
        self.store.set('alphas', rng.normal(0, 1e-3, (2, EDGES, len(PRIMITIVES))), saved=True)
        self.store.set('alpha_gradient', np.zeros((2, EDGES, len(PRIMITIVES))))
        if not build_programs:
            return
        self._run = StaticProgram(self.store, lambda: self._build(['theta', 'alphas']))
        self._evaluate = StaticProgram(self.store, lambda: self._build([]))
        self._run_alphas = self._run             # Paddle's operators always compute all gradients
        if custom_ops.enabled():
            self._run_alphas = StaticProgram(self.store, lambda: self._build(['alphas']))

    def _build(self, differentiated: list[str]) -> list:
        """Builds a program with the gradients of the vectors `differentiated`; returns [loss, top-1, top-5]."""
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
        return [loss, *self._accuracies(logits, labels)]

    def _logits(self, images, theta, alphas, weight_gradients: bool):
        self.layout.unpack(theta, fused=custom_ops.enabled())
        weights = F.softmax(alphas, axis=-1)
        if custom_ops.enabled():
            mixing = [paddle.reshape(table, alphas.shape[1:]) for table in paddle.split(weights, 2, axis=0)]
        else:
            mixing = [None, None]          # the groups of self.mixing hold it
            self.mixing.unpack(paddle.gather(paddle.reshape(weights, [-1]), paddle.assign(self.mixing_source)))
        s0 = s1 = self.stem_norm(conv(images, self.stem, padding=1))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mixing[cell.reduction], weight_gradients)
        return linear(mean_of_planes(s1), self.classifier, self.classifier_bias)

    def run(self, feed: dict) -> Evaluation:
        """Returns loss and accuracies of a batch from `feed`; leaves both gradients on the device."""
        return Evaluation(*map(float, self._run(**feed)))

    def run_alphas(self, feed: dict) -> Evaluation:
        """Like `run`, but guarantees only the gradient of alpha."""
        return Evaluation(*map(float, self._run_alphas(**feed)))

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """Returns mean loss, top-1 and top-5 accuracy (fractions) of a batch; leaves the gradients unchanged."""
        return Evaluation(*map(float, self._evaluate(**self.feed(images, labels))))

    def gradients(self, images: np.ndarray, labels: np.ndarray) -> Gradients:
        """Returns loss, accuracies and the gradients by name: weights {name: array}, alphas {name: [14, 8]}."""
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
        """Returns {'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]}, before the softmax."""
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
        """Returns the softmax of alpha: {'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]}."""
        return {name: softmax(alphas) for name, alphas in self.alphas().items()}

    def genotype(self) -> Genotype:
        """Returns the genotype of the current alpha."""
        return derive(**self.alphas())


def by_cell_kind(alphas: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]} of an array [2, 14, 8]."""
    return {f'alphas_{kind}': array for kind, array in zip(CELL_KINDS, alphas)}
