"""The discrete network of a genotype as static programs.

`NetworkCIFAR` and `NetworkImageNet` differ in stem and auxiliary head. Each has a training program (statistics of the
batch, drop path, auxiliary head) and an evaluation program (running statistics). The weights are one vector theta, the
running statistics another; their parts are named as in the authors' PyTorch code.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

import engine  # noqa: F401  before paddle
import paddle
import paddle.nn.functional as F

from engine import custom_ops
from engine.network import Evaluation, FlatNetwork
from engine.parameters import FlatParameters, ParameterGroup
from engine.programs import StaticProgram
from genotypes import Genotype
from operations import (BN_EPSILON, BN_MOMENTUM, OPERATIONS, BatchNorm, Stem, conv, drop_path_masks, linear,
                        mean_of_planes, not_compiled, operation, preprocess)
from utils import UserError

AUXILIARY = 'auxiliary_head.'               # prefix of the names of its weights
CLASSIFIERS = ('classifier.', AUXILIARY + 'classifier.')        # their weights depend on the number of classes


class Cell:
    """A cell of a genotype: (s0, s1), the outputs of the two cells before, -> [N, len(concat) * C, H', W']."""

    def __init__(self, layout: FlatParameters, genotype: Genotype, prefix: str, c_prev_prev: int, c_prev: int,
                 channels: int, reduction: bool, reduction_prev: bool):
        self.layout, first, first_statistic = layout, len(layout.groups), len(layout.statistics.groups)
        self.preprocess0 = preprocess(layout, f'{prefix}.preprocess0', c_prev_prev, channels, reduction_prev)
        self.preprocess1 = preprocess(layout, f'{prefix}.preprocess1', c_prev, channels, False)
        first_edge = len(layout.groups)
        edges, concat = ((genotype.reduce, genotype.reduce_concat) if reduction else
                         (genotype.normal, genotype.normal_concat))
        names, self.states = zip(*edges)
        strides = [2 if reduction and state < 2 else 1 for state in self.states]
        self.operations = [operation(name, layout, f'{prefix}._ops.{n}', channels, stride)
                           for n, (name, stride) in enumerate(zip(names, strides))]
        # Drop path applies to all edges but identities.
        self.droppable = [not OPERATIONS[name].is_identity(stride) for name, stride in zip(names, strides)]
        self.concat, self.channels_out = concat, len(concat) * channels
        # For the compiled operator: its attributes, and the weights with one tensor per shape of kernels, in the order
        # of their declaration.
        self.attributes = dict(operations=names, states=self.states, concat=concat, channels=channels,
                               reduction=reduction, reduction_prev=reduction_prev)
        self.weights = self.running = None
        self.compiled = not not_compiled(names)
        if self.compiled:
            self.weights = list(layout.fused_views(first).values())
            self.running, = layout.statistics.fused_views(first_statistic).values()
        # The kernels that run over images of the size of the input and of the output, for the count of multiply-adds.
        self.input_kernels, self.edge_kernels = (
            [group for group in groups if group.trailing_shape]
            for groups in (layout.groups[first:first_edge], layout.groups[first_edge:]))

    def __call__(self, s0, s1, masks=None, twice: bool = False) -> tuple:
        """Returns the output twice, for two readers; the second is None unless `twice`.

        masks: None, or the factors of drop path [N, edges other than identities, 1, 1].
        """
        if self.compiled and custom_ops.enabled():
            return self.as_one_operator(s0, s1, masks, twice)
        x = self.by_operations(s0, s1, masks)
        return x, x if twice else None

    def by_operations(self, s0, s1, masks):
        """Adds the cell to the program operation by operation."""
        masks = iter([] if masks is None else paddle.split(masks, sum(self.droppable), axis=1))
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for n, (operate, state, droppable) in enumerate(zip(self.operations, self.states, self.droppable)):
            x = operate(states[state])
            mask = next(masks, None) if droppable else None
            if mask is not None:
                x = x * mask
            if n % 2 == 0:                  # the first of the two edges of a node
                states.append(x)
            else:
                states[-1] = states[-1] + x
        return paddle.concat([states[i] for i in self.concat], axis=1)

    def as_one_operator(self, s0, s1, masks, twice: bool) -> tuple:
        """Adds the cell to the program as one compiled operator."""
        # While training, the operator returns the updated running statistics.
        x, again, self.running.tensor = custom_ops.discrete_cell(
            s0, s1, self.running.tensor, masks, [view.tensor for view in self.weights], **self.attributes,
            training=self.layout.training, twice=twice, epsilon=BN_EPSILON, momentum=BN_MOMENTUM)
        for groups, image in ((self.input_kernels, s1), (self.edge_kernels, x)):
            for group in groups:
                group.positions += image.shape[2] * image.shape[3]
        return x, again


class AuxiliaryHead:
    """A classifier after the second reduction cell, for the training only (arXiv 1409.4842).

    Its input of S x S is pooled to 2 x 2, with a kernel of 5/8 S (at most S - 1) and a stride of the rest: for the
    authors' sizes, 8 x 8 (CIFAR) and 7 x 7 (ImageNet), these are their kernel of 5 and their strides of 3 and 2.
    """

    def __init__(self, layout: FlatParameters, channels: int, classes: int, last_norm: bool):
        names = [f'{AUXILIARY}features.{n}' for n in (2, 3, 5, 6)]
        self.reduce = layout.declare([f'{names[0]}.weight'], [128, channels, 1, 1])
        self.reduce_norm = BatchNorm(layout, [names[1]], 128, affine=True)
        self.expand = layout.declare([f'{names[2]}.weight'], [768, 128, 2, 2])
        self.expand_norm = BatchNorm(layout, [names[3]], 768, affine=True) if last_norm else None
        self.classifier = layout.declare([f'{AUXILIARY}classifier.weight'], [classes, 768])
        self.classifier_bias = layout.declare([f'{AUXILIARY}classifier.bias'], [classes], bound=768 ** -0.5)

    def __call__(self, x):
        size = x.shape[2]
        kernel = min(math.ceil(5 * size / 8), size - 1)
        x = F.avg_pool2d(F.relu(x), kernel, size - kernel, 0)               # [N, C, 2, 2]
        # Both convolutions as products: Paddle's convolutions of few places take several times as long on the CPU.
        x = self._product(paddle.reshape(paddle.transpose(x, [0, 2, 3, 1]), [-1, 4, x.shape[1]]), self.reduce)
        x = F.relu(self.reduce_norm(paddle.reshape(x, [-1, self.reduce.rows])))                 # [4 N, 128]
        x = paddle.transpose(paddle.reshape(x, [-1, 4, self.reduce.rows]), [0, 2, 1])           # [N, 128, 4]
        x = self._product(paddle.flatten(x, 1), self.expand)                                    # [N, 768]
        x = F.relu(self.expand_norm(x) if self.expand_norm else x)
        return linear(x, self.classifier, self.classifier_bias)

    @staticmethod
    def _product(x, weight: ParameterGroup):
        """Returns a convolution [N, places, out], or [N, out] for one place; x: the numbers that it reads."""
        weight.positions += math.prod(x.shape[1:-1])
        return paddle.matmul(x, paddle.reshape(weight.tensor, [weight.rows, -1]), transpose_y=True)


class Network(FlatNetwork):
    """A discrete network on one device, with its weights and running statistics.

    channels: C of the first cell (ImageNet: after the stem); classes: their number; layers: the number of cells.
    auxiliary: weight of the auxiliary head's loss, which is added to that of the network; 0 for no auxiliary head.
    label_smooth: fraction of the label that is spread over all classes.
    use_drop_path: whether `run` applies its drop_path_prob.
    with_training=False builds the evaluation program only; build_programs=False builds none, for names and shapes only.
    dtype: 'float32' or 'float64'; seed: of the initial weights; image_size: height and width; place: the CPU when None.
    Raises UserError for sizes that cannot be built.
    """

    def __init__(self, genotype: Genotype, channels: int, classes: int, layers: int, *, auxiliary: float = 0.0,
                 label_smooth: float = 0.0, use_drop_path: bool = False, with_training: bool = True,
                 build_programs: bool = True, dtype: str = 'float32', seed: int = 0, image_size: int | None = None,
                 place=None):
        if channels < 2 or channels % 2:
            raise UserError(f"init_channels is {channels}, but has to be even and positive: "
                            "the output of FactorizedReduce consists of two halves")
        image_size = image_size or self.IMAGE_SIZE
        if image_size % self.DIVISOR:
            raise UserError(f"images of {image_size} x {image_size} cannot be halved as often as the cells do: "
                            f"the size has to be a multiple of {self.DIVISOR}")
        super().__init__(classes, image_size, FlatParameters(running_statistics=True))
        self.auxiliary, self.label_smooth, self.use_drop_path = auxiliary, label_smooth, use_drop_path
        c_prev_prev, c_prev, reduction_prev = self._declare_stem(channels)
        self.cells, self.auxiliary_head = [], None
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            cell = Cell(self.layout, genotype, f'cells.{i}', c_prev_prev, c_prev, channels, reduction, reduction_prev)
            self.cells.append(cell)
            c_prev_prev, c_prev, reduction_prev = c_prev, cell.channels_out, reduction
        self.auxiliary_after = 2 * layers // 3
        if auxiliary and with_training:
            self._check_auxiliary(layers)
            self.auxiliary_head = AuxiliaryHead(self.layout, self.cells[self.auxiliary_after].channels_out, classes,
                                                self.AUXILIARY_NORM)
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes], bound=c_prev ** -0.5)
        self._allocate(place, dtype, np.random.default_rng(seed))
        self.store.set_number('keep', 1.0)         # the probability of keeping an edge in drop path
        if with_training and build_programs:
            self._run = StaticProgram(self.store, self._build_training)
        if build_programs:
            self._evaluate = StaticProgram(self.store, self._build_evaluation)
        self._infer: StaticProgram | None = None

    def _check_auxiliary(self, layers: int) -> None:
        size, reductions = self.image_size // self.STEM_STRIDE, len({layers // 3, 2 * layers // 3})
        if size // 2 ** reductions < 2:
            raise UserError(f"images of {self.image_size} x {self.image_size} are too small for the auxiliary head, "
                            "which gets a single pixel: use larger images, or --auxiliary False")

    @property
    def param_count(self) -> int:
        """The number of weights without the auxiliary head."""
        return self.layout.count(without=AUXILIARY)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of convolutions and classifier for one image, without the auxiliary head."""
        return self.layout.multiply_adds(without=AUXILIARY)

    def _build_training(self) -> list:
        """Builds the training program: gradient, running statistics; fetches nothing."""
        images, labels = self._inputs()
        theta = self.store.variable('theta', trainable=True)
        self._unpack(theta, training=True)
        logits, auxiliary_logits = self._logits(images, self._drop_path(images))
        loss = self._smoothed_loss(logits, labels)
        if auxiliary_logits is not None:
            weight = self.store.scalar(self.auxiliary)
            loss = loss + paddle.sum(weight * self._smoothed_loss(auxiliary_logits, labels))
        gradient, = paddle.static.gradients([loss], [theta])
        self.store.assign('gradient', gradient)
        self.store.assign('statistics', self.layout.statistics.pack())
        self._assign_metrics(loss, logits, labels)
        return []

    def _build_evaluation(self) -> list:
        """Builds the evaluation program; fetches nothing."""
        images, labels = self._inputs()
        self._unpack(self.store.variable('theta'), training=False)
        logits, _ = self._logits(images)
        self._assign_metrics(F.cross_entropy(logits, labels), logits, labels)
        return []

    def _build_logits(self) -> list:
        """Builds the evaluation program without labels; returns [logits]."""
        images, _ = self._inputs()
        self._unpack(self.store.variable('theta'), training=False)
        return [self._logits(images)[0]]

    def _unpack(self, theta, training: bool) -> None:
        self.layout.training = training
        self.layout.unpack(theta, fused=custom_ops.enabled())
        self.layout.statistics.unpack(self.store.variable('statistics'), fused=custom_ops.enabled())

    def _drop_path(self, images):
        """Returns the masks of the droppable edges of each cell; None for each cell without drop path."""
        if not self.use_drop_path:
            return [None] * len(self.cells)
        counts = [sum(cell.droppable) for cell in self.cells]            # 0 for a cell of identities
        masks = drop_path_masks(paddle.shape(images)[0], sum(counts), self.store.variable('keep'))
        parts = iter(paddle.split(masks, [count for count in counts if count], axis=1))
        return [next(parts) if count else None for count in counts]

    def _logits(self, images, masks=None):
        """Returns logits [N, classes], and those of the auxiliary head while training, otherwise None."""
        s0, s1 = self._stem(images)
        again, auxiliary_logits = s1, None              # again: s1 for the second cell that reads it
        for i, (cell, mask) in enumerate(zip(self.cells, masks or [None] * len(self.cells))):
            s0, (s1, again) = again, cell(s0, s1, mask, twice=i + 2 < len(self.cells))
            if self.auxiliary_head and self.layout.training and i == self.auxiliary_after:
                auxiliary_logits = self.auxiliary_head(s1)
        return linear(mean_of_planes(s1), self.classifier, self.classifier_bias), auxiliary_logits

    def _smoothed_loss(self, logits, labels):
        """Returns the cross entropy with (1 - e) one_hot + e / classes, e = label_smooth.

        arXiv 1512.00567, section 7.
        """
        if not self.label_smooth:
            return F.cross_entropy(logits, labels)
        targets = F.one_hot(paddle.flatten(labels), self.classes).astype(logits.dtype)
        return F.cross_entropy(logits, F.label_smooth(targets, epsilon=self.label_smooth), soft_label=True)

    def run(self, feed: dict, drop_path_prob: float = 0.0, seed: int = 0) -> Evaluation:
        """Returns loss (with the auxiliary head's) and accuracies of a training batch from `feed`.

        Leaves the gradient on the device and updates the running statistics. seed: of the masks of drop path.
        """
        if self.use_drop_path:
            paddle.seed(seed)
            self.store.set_number('keep', 1 - drop_path_prob)
        self._run(**feed)
        return self._metrics()

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """Returns mean loss, top-1 and top-5 accuracy (fractions) of a batch, with running statistics."""
        self._evaluate(**self.feed(images, labels))
        return self._metrics()

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits [N, classes] of images [N, 3, H, W], with running statistics."""
        if self._infer is None:            # few users need it
            self._infer = StaticProgram(self.store, self._build_logits)
        return self._infer(**self.feed(images, np.zeros(len(images))))[0]

    def load_weights(self, weights: dict[str, np.ndarray], classifiers: bool = True) -> None:
        """Sets all weights and running statistics from {name: array}; the classifiers keep theirs if not `classifiers`.

        An auxiliary head that is missing there keeps its weights; one that this network lacks is ignored. Raises
        UserError for any other weight that is missing, unknown or of a wrong shape.
        """
        ignored = (() if classifiers else CLASSIFIERS) + (() if self.auxiliary_head else (AUXILIARY,))
        weights = {name: array for name, array in weights.items() if not name.startswith(ignored)}
        has_auxiliary = any(name.startswith(AUXILIARY) for name in weights)
        self.check_complete(weights, without=ignored if has_auxiliary else (*ignored, AUXILIARY))
        self.set_weights(weights)

    def export(self, path: str) -> None:
        """Writes the network to path.* in Paddle's format for inference: images [N, 3, H, W] -> logits.

        Each weight is a parameter with its name there, and N is free.
        """
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with custom_ops.disabled(), paddle.static.scope_guard(scope), \
                paddle.static.program_guard(program, paddle.static.Program()):
            images = paddle.static.data('images', [None, 3, self.image_size, self.image_size], 'float32')
            self.layout.training = False
            self.layout.create_parameters()
            self.layout.statistics.create_parameters()
            logits, _ = self._logits(images)
            for name, array in self.weights().items():
                scope.var(name).get_tensor().set(array.astype('float32'), self.store.place)
            paddle.static.save_inference_model(path, [images], [logits], paddle.static.Executor(self.store.place),
                                               program=program)


class NetworkCIFAR(Network):
    """The network for small images, by default of 32 x 32 (arXiv 1806.09055, section 3.2)."""

    IMAGE_SIZE, DIVISOR, STEM_STRIDE = 32, 4, 1
    AUXILIARY_NORM = True                   # whether the auxiliary head has the last BN

    def _declare_stem(self, channels: int) -> tuple[int, int, bool]:
        """Declares the stem; returns the channels of s0 and s1, and whether the first cell has to reduce s0."""
        self.stem = Stem(self.layout, 3 * channels)
        return 3 * channels, 3 * channels, False

    def _stem(self, images):
        x = self.stem(images, custom_ops.enabled())
        return x, x


class NetworkImageNet(Network):
    """The network for images of 224 x 224 (arXiv 1806.09055, section 3.3)."""

    IMAGE_SIZE, DIVISOR, STEM_STRIDE = 224, 32, 8
    AUXILIARY_NORM = False

    def _declare_stem(self, channels: int) -> tuple[int, int, bool]:
        layout = self.layout
        self.stem = [layout.declare([f'{name}.weight'], [c_out, c_in, 3, 3]) for name, c_in, c_out in (
            ('stem0.0', 3, channels // 2), ('stem0.3', channels // 2, channels), ('stem1.1', channels, channels))]
        self.stem_norms = [BatchNorm(layout, [name], c, affine=True) for name, c in (
            ('stem0.1', channels // 2), ('stem0.4', channels), ('stem1.2', channels))]
        return channels, channels, True

    def _stem(self, images):
        """Returns s0 [N, C, H / 4, W / 4] and s1 [N, C, H / 8, W / 8]."""
        x, outputs = images, []
        for number, (weight, norm) in enumerate(zip(self.stem, self.stem_norms)):
            x = norm(conv(F.relu(x) if number else x, weight, stride=2, padding=1))
            outputs.append(x)
        return outputs[1], outputs[2]


class Shape(NamedTuple):
    """The sizes of a network: those of its arguments that the names and shapes of its weights determine."""
    kind: type[Network]
    init_channels: int
    class_num: int
    layers: int
    auxiliary: bool

    def as_metadata(self) -> dict:
        """Returns the part that a file of weights records."""
        return {name: int(getattr(self, name)) for name in ('init_channels', 'class_num', 'layers')}


def shape_of(weights: dict[str, np.ndarray]) -> Shape:
    """Returns the sizes of the network with the weights {name: array}.

    Raises UserError when a weight that determines them is missing or has another number of dimensions.
    """
    def shape(name: str, dimensions: int) -> tuple:
        if name not in weights:
            raise UserError(f"weight {name!r} is missing")
        if np.ndim(weights[name]) != dimensions or not np.size(weights[name]):
            raise UserError(f"weight {name} has shape {list(np.shape(weights[name]))}, expected {dimensions} "
                            "dimensions")
        return np.shape(weights[name])

    if 'stem0.0.weight' in weights:
        kind, channels = NetworkImageNet, shape('stem0.3.weight', 4)[0]
    else:
        kind, channels = NetworkCIFAR, shape('stem.0.weight', 4)[0] // 3
    cells = {name.split('.')[1] for name in weights if name.startswith('cells.')}
    return Shape(kind, channels, shape('classifier.weight', 2)[0], max(1, len(cells)),
                 any(name.startswith(AUXILIARY) for name in weights))


def network_of(genotype: Genotype, weights: dict[str, np.ndarray], **settings) -> Network:
    """Returns the network of a genotype with the weights {name: array}, of the sizes that these determine.

    settings: of Network. Raises UserError for weights that are missing, unknown or of a wrong shape.
    """
    shape = shape_of(weights)
    network = shape.kind(genotype, shape.init_channels, shape.class_num, shape.layers,
                         auxiliary=float(shape.auxiliary), **settings)
    network.load_weights(weights)
    return network
