"""The mixed-op supernet of DARTS as a static program, compiled once.

The supernet is a pure function (theta, alphas, images, labels) -> loss, top-1, top-5, gradients, with all
weights in the vector theta and alpha of both kinds of cell in one [2, 14, 8]. It is built in few
operators: all edges that leave a state are batched (see operations.py), operations without weights
are computed once a state, and alpha enters as the scale of the batch normalisations that are there
anyway. The result is that of the network built edge by edge, and tests/test_model_search.py shows it.
"""
from collections import namedtuple

import numpy as np
import paddle
import paddle.nn.functional as F

import custom_ops
from genotypes import EDGES, FIRST_EDGE, NODES, PRIMITIVES, derive, softmax
from operations import (BN_EPSILON, BatchNorm, DilConv, FactorizedReduce, ReLUConvBN, SepConv, States, avg_pool,
                        batch_norm, conv, linear, max_pool, mean_of_planes)
from parameters import Blocks, Evaluation, FlatNetwork, Function, Layout, check_numbers
from utils import UserError

# The columns of alpha, in the order of PRIMITIVES.
NONE, MAX_POOL, AVG_POOL, SKIP, SEP_3, SEP_5, DIL_3, DIL_5 = range(len(PRIMITIVES))

# The states of a cell in the groups that are computed together: both inputs are there from the start.
STATE_GROUPS = ((0, 1), (2,), (3,), (4,))

CELL_KINDS = ('normal', 'reduce')           # the first axis of alphas

Gradients = namedtuple('Gradients', 'loss top1 top5 weights alphas')


class MixedOps:
    """All mixed operations on the edges that leave a group of states.

    An edge is sum_k softmax(alpha)_k op_k(state). What the group contributes to the nodes behind it
    is computed together, its edges ordered by node, then by state.
    """

    def __init__(self, layout, mixing, prefix, states, channels, reduction):
        self.states, self.channels = len(states), channels
        self.stride = 2 if reduction and max(states) < 2 else 1
        nodes = [node for node in range(NODES) if 2 + node > max(states)]
        self.nodes = len(nodes)
        edges = [FIRST_EDGE[node] + state for node in nodes for state in states]

        def names(k):
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

        # Where softmax(alpha) goes: a scale for every channel of the BN that ends an operation with
        # weights, and a kernel that mixes the results without weights into [nodes] outputs.
        def entry(edge, k):
            return (int(reduction) * EDGES + edge) * len(PRIMITIVES) + k

        self.scales = {k: mixing.add(len(edges), [channels]) for k in self.ops}
        for k, block in self.scales.items():
            block.source = np.repeat([entry(edge, k) for edge in edges], channels)
        self.mix = mixing.add(1, [len(nodes), len(unweighted) * len(states), 1, 1])
        self.mix.source = [entry(FIRST_EDGE[node] + state, k)
                           for node in nodes for k in unweighted for state in states]

    def __call__(self, x):
        """x: the states side by side [N, states * C, H, W] -> summands, each [N, nodes * C, H', W']."""
        states = States(x, self.nodes)
        # Each [N, nodes * states * C, H', W'].
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

    def __init__(self, layout, mixing, prefix, c_prev_prev, c_prev, channels, reduction, reduction_prev):
        self.channels, self.reduction = channels, reduction
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(layout, [f'{prefix}.preprocess0'], c_prev_prev, channels, affine=False)
        self.preprocess1 = ReLUConvBN(layout, [f'{prefix}.preprocess1'], c_prev, channels, affine=False)
        first = len(layout.blocks)
        self.mixed = [MixedOps(layout, mixing, prefix, states, channels, reduction) for states in STATE_GROUPS]
        bundles = layout.bundles(first)
        self.bundles = [bundles[tail] for tail in ((1, 3, 3), (1, 5, 5), (channels, 1, 1))]

    def __call__(self, s0, s1, mixing, weight_gradients):
        """mixing: softmax(alpha) [14, 8] of this kind of cell; weight_gradients: whether they are wanted."""
        x = batch_norm(paddle.concat([self.preprocess0.convolve(s0), self.preprocess1.convolve(s1)], axis=1))
        if custom_ops.enabled():
            return custom_ops.mixed_cell(x, *(bundle.tensor for bundle in self.bundles), mixing, self.reduction,
                                         weight_gradients, BN_EPSILON)
        nodes, sums = [], []          # sums: what the states so far contribute to the nodes not yet complete
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

    channels: C of the first cell, even; classes; layers: cells, at least 3; dtype: 'float32' or
    'float64'; seed: of the initial weights and alpha; image_size: height and width, a multiple of 4;
    place: where to compute, the CPU when None; built=False makes no program: names and shapes only.
    Raises UserError for sizes that cannot be built.

    The weights are the vector `theta` of the store, alpha is `alphas` [2, 14, 8] (normal, reduce);
    `run` leaves the gradients of both in `gradient` and `alpha_gradient`, on the device.

    Batch normalisation uses the statistics of the batch, in validation too: running statistics of
    weights that alpha rescales in every step would lag behind both.

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

    One step of the architect, and the gradient of alpha that it used:

    >>> architect = Architect(supernet)
    >>> architect.step(train, valid, lr=0.025)
    >>> architect.alpha_gradients()['alphas_normal'].shape
    (14, 8)
    >>> supernet.genotype().normal_concat
    (2, 3, 4, 5)
    """

    def __init__(self, channels=16, classes=10, layers=8, dtype='float32', seed=0, image_size=32, place=None,
                 built=True):
        if layers < 3:
            raise UserError(f"layers is {layers}, but two reduction cells after the first cell need at least 3")
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels is {channels}, but has to be even and positive: "
                            "FactorizedReduce makes its output of two halves")
        if image_size < 4 or image_size % 4:
            raise UserError(f"images of {image_size} x {image_size} cannot be halved twice")
        super().__init__(classes, image_size, Layout())
        self.mixing = Blocks()
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
        self.mixing.seal()
        self.mixing_source = np.empty(self.mixing.size, 'int32')
        for block in self.mixing.blocks:
            self.mixing_source[block.offset:block.offset + block.size] = block.source

        rng = np.random.default_rng(seed)
        self._place(place, dtype, rng)
        self.store.set('alphas', rng.normal(0, 1e-3, (2, EDGES, len(PRIMITIVES))))
        self.store.set('alpha_gradient', np.zeros((2, EDGES, len(PRIMITIVES))))
        if not built:
            return
        self._run = Function(self.store, lambda: self._build(['theta', 'alphas']))
        self._evaluate = Function(self.store, lambda: self._build([]))
        self._run_alphas = Function(self.store, lambda: self._build(['alphas'])) if custom_ops.enabled() else self._run

    def _build(self, wanted):
        """The program of the supernet with the gradients of the vectors `wanted`; returns [loss, top-1, top-5]."""
        store = self.store
        images, labels = self._inputs()
        theta, alphas = store.variable('theta', trainable=True), store.variable('alphas', trainable=True)
        logits = self._logits(images, theta, alphas, weight_gradients='theta' in wanted)
        loss = F.cross_entropy(logits, labels)
        if wanted:
            # Both, always: Paddle 2.6 cannot leave out an output of an operator that is not its own.
            gradients = dict(zip(('theta', 'alphas'), paddle.static.gradients([loss], [theta, alphas])))
            for name in wanted:
                store.assign({'theta': 'gradient', 'alphas': 'alpha_gradient'}[name], gradients[name])
        return [loss, *self._accuracies(logits, labels)]

    def _logits(self, images, theta, alphas, weight_gradients):
        self.layout.unpack(theta, bundled=custom_ops.enabled())
        weights = F.softmax(alphas, axis=-1)
        if custom_ops.enabled():
            mixing = [paddle.reshape(each, alphas.shape[1:]) for each in paddle.split(weights, 2, axis=0)]
        else:
            mixing = [None, None]          # a block for each operation has it
            self.mixing.unpack(paddle.gather(paddle.reshape(weights, [-1]), paddle.assign(self.mixing_source)))
        s0 = s1 = self.stem_norm(conv(images, self.stem, padding=1))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mixing[cell.reduction], weight_gradients)
        return linear(mean_of_planes(s1), self.classifier, self.classifier_bias)

    def run(self, feed):
        """Loss and gradients of a batch from `feed`; the gradients stay on the device."""
        return Evaluation(*map(float, self._run(**feed)))

    def run_alphas(self, feed):
        """`run` for who needs the gradient of alpha alone: that of the weights may stay as it was."""
        return Evaluation(*map(float, self._run_alphas(**feed)))

    def evaluate(self, images, labels):
        """Mean loss, top-1 and top-5 accuracy (fractions) of a batch; the gradients are not touched."""
        return Evaluation(*map(float, self._evaluate(**self.feed(images, labels))))

    def gradients(self, images, labels):
        """Loss, accuracies and the gradients by name: weights {name: array}, alphas {name: [14, 8]}."""
        evaluation = self.run(self.feed(images, labels))
        return Gradients(*evaluation, self.layout.named(self.store.get('gradient')),
                         by_cell_kind(self.store.get('alpha_gradient')))

    def load_weights(self, weights):
        """Sets all weights, and both alphas if there is one, from {name: array}.

        Raises UserError naming what is missing or unknown, or has a wrong shape.
        """
        alphas = {name: array for name, array in weights.items() if name.startswith('alphas_')}
        weights = {name: array for name, array in weights.items() if name not in alphas}
        self.check_complete(weights)
        missing = [name for name in self.alphas() if alphas and name not in alphas]
        if missing:
            raise UserError(f"{missing[0]} is missing beside {', '.join(alphas)}")
        self.set_weights(weights)
        self.set_alphas(alphas)

    def alphas(self):
        """{'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]}, before the softmax."""
        return by_cell_kind(self.store.get('alphas'))

    def set_alphas(self, alphas):
        """Sets alpha of one or both kinds of cell; UserError for an unknown name or a wrong shape."""
        both = self.store.get('alphas')
        for name, array in alphas.items():
            if name not in self.alphas():
                raise UserError(f"unknown alpha {name!r}: there are {' and '.join(self.alphas())}")
            check_numbers(name, np.asarray(array))
            if np.shape(array) != both.shape[1:]:
                raise UserError(f"{name} has shape {list(np.shape(array))}, expected {list(both.shape[1:])}")
            both[list(self.alphas()).index(name)] = array
        self.store.set('alphas', both)

    def mixing_weights(self):
        """softmax of alpha: {'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]}."""
        return {name: softmax(alphas) for name, alphas in self.alphas().items()}

    def genotype(self):
        """The genotype that the present alpha stands for."""
        return derive(**self.alphas())


def by_cell_kind(alphas):
    """{'alphas_normal': [14, 8], 'alphas_reduce': [14, 8]} of an array [2, 14, 8]."""
    return {f'alphas_{kind}': array for kind, array in zip(CELL_KINDS, alphas)}
