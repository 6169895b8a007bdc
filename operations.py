"""The operations of search spaces and discrete cells as builders of static graphs, and the table of them, OPERATIONS.

A class declares its weights when it is created and adds its operators to the program under construction when it is
called. It computes n edges at once: `prefixes` are the names of the edges, the input is [N, n * C, H, W] with edge e
in the channels e * C to (e + 1) * C, and the output has the same layout. The supernet batches all edges that leave a
state; a discrete network has n = 1 (see `operation`). The result is that of n separate operations, in a fraction of
the operators: depthwise convolution and batch normalisation treat every channel separately, and a pointwise
convolution becomes a grouped one.
"""
from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import engine  # noqa: F401  before paddle
import paddle
import paddle.nn.functional as F

import utils
from engine import custom_ops
from engine.parameters import FlatParameters, ParameterGroup
from engine.programs import constant
from genotypes import DARTS_SPACE, NONE, SearchSpace
from utils import UserError

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9                # of running statistics, in Paddle's sense: the part that is kept


def conv(x, weight: ParameterGroup, stride=1, padding=0, dilation=1, groups=1):
    """Returns the convolution of x [N, C, H, W] with weight [out, C / groups, k, k], without bias."""
    x = F.conv2d(x, weight.tensor, None, stride, padding, dilation, groups)
    weight.positions += x.shape[2] * x.shape[3]
    return x


def linear(x, weight: ParameterGroup, bias: ParameterGroup):
    """Returns x [N, features] @ weight [classes, features]^T + bias [classes]."""
    weight.positions += 1
    return paddle.matmul(x, weight.tensor, transpose_y=True) + bias.tensor


def mean_of_planes(x):
    """Averages x [N, C, H, W] over the image, to [N, C].

    Over one flattened axis: Paddle's CPU gradient of a mean over two axes takes ten times as long.
    """
    return paddle.mean(paddle.flatten(x, 2), axis=2)


class States:
    """States side by side, x [N, C, H, W], as input of the operations on the edges that leave them.

    copies: the number of edges that leave each state; the edges are numbered copy by copy.
    """

    def __init__(self, x, copies: int = 1):
        self.x, self.copies = x, copies

    @functools.cached_property
    def rectified(self):
        """relu(x) for every edge, [N, copies * C, H, W]; operations that begin with a ReLU share it."""
        x = F.relu(self.x)
        return paddle.tile(x, [1, self.copies, 1, 1]) if self.copies > 1 else x

    @functools.cached_property
    def repeated(self):
        """x for every edge, [N, copies * C, H, W], for operations that do not begin with a ReLU."""
        return paddle.tile(self.x, [1, self.copies, 1, 1]) if self.copies > 1 else self.x


def max_pool(x, stride: int):
    return F.max_pool2d(x, 3, stride, 1)


def avg_pool(x, stride: int):
    return F.avg_pool2d(x, 3, stride, 1, exclusive=True)  # padding is not counted


def batch_norm(x, scale=None, shift=None):
    """Normalises x [N, C, H, W] by the statistics of the batch (arXiv 1502.03167).

    scale, shift: variables [C]; without a scale neither is applied. The supernet passes mixing weights as scale,
    without a shift: the product of a mixing weight and BN(x) needs no operator of its own.
    """
    channels = x.shape[1]
    # Paddle requires a scale and a shift, and both or neither with gradients.
    if scale is None:
        scale, shift = constant([channels], 1.0, x.dtype), constant([channels], 0.0, x.dtype)
    elif shift is None:
        shift = constant([channels], 0.0, x.dtype, trainable=True)
    # The input of running statistics cannot be omitted; momentum 1 leaves them unchanged.
    mean, variance = constant([channels], 0.0, x.dtype), constant([channels], 1.0, x.dtype)
    return F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=1.0, epsilon=BN_EPSILON)


class BatchNorm:
    """Batch normalisation of n edges of C channels; affine: with a trained scale and shift.

    If the layout has running statistics, a program for training updates them and any other program normalises by them;
    otherwise the statistics of the batch are used.
    """

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], channels: int, affine: bool):
        self.layout, self.scale, self.mean = layout, None, None
        if affine:
            self.scale = layout.declare([f'{p}.weight' for p in prefixes], [channels], value=1.0)
            self.shift = layout.declare([f'{p}.bias' for p in prefixes], [channels], value=0.0)
        if layout.statistics:
            self.mean = layout.statistics.declare([f'{p}.running_mean' for p in prefixes], [channels], value=0.0)
            self.variance = layout.statistics.declare([f'{p}.running_var' for p in prefixes], [channels], value=1.0)

    def __call__(self, x, scale=None):
        if self.mean is not None:
            # While training, the operator overwrites the running statistics that it is given.
            return F.batch_norm(x, self.mean.tensor, self.variance.tensor, self.scale.tensor, self.shift.tensor,
                                training=self.layout.training, momentum=BN_MOMENTUM, epsilon=BN_EPSILON)
        if self.scale is not None:
            return batch_norm(x, self.scale.tensor, self.shift.tensor)
        return batch_norm(x, scale)


class Stem:
    """Convolution 3 x 3 of the images, BN: the input of the first cell, except for ImageNet."""

    def __init__(self, layout: FlatParameters, channels: int):
        self.layout = layout
        self.weight = layout.declare(['stem.0.weight'], [channels, 3, 3, 3])
        self.norm = BatchNorm(layout, ['stem.1'], channels, affine=True)

    def __call__(self, images, compiled: bool, weight_gradients: bool = True):
        """compiled: whether as one compiled operator, for which weight_gradients=False leaves the gradients of the
        weights 0.
        """
        if not compiled:
            return self.norm(conv(images, self.weight, padding=1))
        norm = self.norm
        running = (norm.mean.tensor, norm.variance.tensor) if self.layout.statistics else (
            constant([self.weight.rows], value, norm.scale.tensor.dtype) for value in (0.0, 1.0))
        x, *running = custom_ops.stem(images, self.weight.tensor, norm.scale.tensor, norm.shift.tensor, *running,
                                      self.layout.training, weight_gradients, BN_EPSILON, BN_MOMENTUM)
        if self.layout.statistics:
            norm.mean.tensor, norm.variance.tensor = running
        self.weight.positions += x.shape[2] * x.shape[3]
        return x


class ReLUConvBN:
    """ReLU, 1x1 convolution from c_in to c_out channels, BN: the preprocessing of a cell's input."""

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], c_in: int, c_out: int, affine: bool):
        self.groups = len(prefixes)
        self.kernels = [layout.declare([f'{p}.op.1.weight' for p in prefixes], [c_out, c_in, 1, 1])]
        self.norm = BatchNorm(layout, [f'{p}.op.2' for p in prefixes], c_out, affine)

    def convolve(self, x):
        """Returns the result before the BN."""
        return conv(F.relu(x), self.kernels[0], groups=self.groups)

    def __call__(self, x):
        return self.norm(self.convolve(x))


class FactorizedReduce:
    """ReLU, two convolutions 1x1 with stride 2 on grids one pixel apart, side by side, BN.

    Halves height and width, [N, n * c_in, H, W] -> [N, n * c_out, H / 2, W / 2], and reads half of the pixels, where a
    single convolution with stride 2 would read a quarter.
    """

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], c_in: int, c_out: int, affine: bool):
        self.edges, self.c_half = len(prefixes), c_out // 2
        self.kernels = [layout.declare([f'{p}.conv_{k}.weight' for p in prefixes], [c_out // 2, c_in, 1, 1])
                        for k in (1, 2)]
        self.norm = BatchNorm(layout, [f'{p}.bn' for p in prefixes], c_out, affine)

    def convolve(self, x):
        """Returns the result before the BN, of x before the ReLU."""
        return self._convolve(F.relu(x))

    def _convolve(self, x):
        first = conv(x, self.kernels[0], stride=2, groups=self.edges)
        second = conv(x[:, :, 1:, 1:], self.kernels[1], stride=2, groups=self.edges)
        if self.edges == 1:
            return paddle.concat([first, second], axis=1)
        # The halves of an edge belong together: [N, edges, c_half, H, W] twice -> [N, edges, c_out, H, W].
        height, width = first.shape[2:]
        halves = [paddle.reshape(h, [0, self.edges, self.c_half * height, width]) for h in (first, second)]
        return paddle.reshape(paddle.concat(halves, axis=2), [0, self.edges * self.c_half * 2, height, width])

    def __call__(self, states, scale=None):
        return self.norm(self._convolve(states.rectified), scale)


class SeparableConv:
    """ReLU, depthwise k x k, pointwise, BN, on `States`."""

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], channels: int, kernel: int, stride: int,
                 affine: bool, dilation: int, first: int):
        """first: index of the depthwise convolution in the parameter names of the authors' code."""
        self.edges, self.channels = len(prefixes), channels
        self.stride, self.dilation, self.padding = stride, dilation, dilation * (kernel // 2)
        self.depthwise = layout.declare(
            [f'{p}.op.{first}.weight' for p in prefixes], [channels, 1, kernel, kernel])
        self.pointwise = layout.declare(
            [f'{p}.op.{first + 1}.weight' for p in prefixes], [channels, channels, 1, 1])
        self.norm = BatchNorm(layout, [f'{p}.op.{first + 2}' for p in prefixes], channels, affine)

    def convolve(self, states):
        """Returns the result before the BN."""
        groups = self.edges * self.channels
        x = conv(states.rectified, self.depthwise, self.stride, self.padding, self.dilation, groups)
        return conv(x, self.pointwise, groups=self.edges)

    def __call__(self, states, scale=None):
        return self.norm(self.convolve(states), scale)


class DilConv(SeparableConv):
    """A separable convolution with dilation 2."""

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], channels: int, stride: int, affine: bool,
                 kernel: int):
        super().__init__(layout, prefixes, channels, kernel, stride, affine, dilation=2, first=1)


class SepConv:
    """Two separable convolutions, the second with stride 1."""

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], channels: int, stride: int, affine: bool,
                 kernel: int):
        self.first = SeparableConv(layout, prefixes, channels, kernel, stride, affine, dilation=1, first=1)
        self.second = SeparableConv(layout, prefixes, channels, kernel, 1, affine, dilation=1, first=5)

    def __call__(self, states, scale=None):
        return self.second(States(self.first(states)), scale)


class Conv7x1_1x7:
    """ReLU, convolutions 1 x 7 and 7 x 1, BN, on `States`: an operation of AmoebaNet (arXiv 1802.01548)."""

    def __init__(self, layout: FlatParameters, prefixes: Sequence[str], channels: int, stride: int, affine: bool):
        self.edges, self.stride = len(prefixes), stride
        self.row = layout.declare([f'{p}.1.weight' for p in prefixes], [channels, channels, 1, 7])
        self.column = layout.declare([f'{p}.2.weight' for p in prefixes], [channels, channels, 7, 1])
        self.norm = BatchNorm(layout, [f'{p}.3' for p in prefixes], channels, affine)

    def __call__(self, states, scale=None):
        x = conv(states.rectified, self.row, [1, self.stride], [0, 3], groups=self.edges)
        return self.norm(conv(x, self.column, [self.stride, 1], [3, 0], groups=self.edges), scale)


def skip_connect(layout: FlatParameters, prefixes: Sequence[str], channels: int, stride: int, affine: bool) -> Callable:
    """Returns the operation of skip_connect that has weights: with stride 2, where the identity is not possible."""
    return FactorizedReduce(layout, prefixes, channels, channels, affine)


class Operation(NamedTuple):
    """How an operation is built, and what the supernet has to know to weight its result.

    build: (layout, prefixes, channels, stride, affine) -> a function of `States` that computes the n = len(prefixes)
        edges at once, [N, n * C, H', W']. It declares its weights by names that begin with the prefix of the edge, and
        affine says whether its batch normalisations have a scale and a shift. None: there are no weights.
    ends_in_norm: whether the function of `build` ends in a batch normalisation and takes a second argument, the scale
        of that normalisation: the supernet passes the mixing weights there. If not, it multiplies the result by them.
    pool: (x, stride) -> the result on every plane of x, for an operation without weights. The supernet computes it once
        per state and normalises it.
    identity: whether the operation returns its input when the stride is 1; `build` is then for stride 2.
    compiled: whether the compiled operators (engine/custom_ops) know the name and compute this very function. A cell
        with an entry that is not compiled uses Paddle's operators.
    """
    build: Callable | None = None
    ends_in_norm: bool = True
    pool: Callable | None = None
    identity: bool = False
    compiled: bool = False

    def has_weights(self, stride: int) -> bool:
        """Whether the operation has weights with this stride."""
        return self.build is not None and not self.is_identity(stride)

    def is_identity(self, stride: int) -> bool:
        """Whether the operation returns its input with this stride."""
        return self.identity and stride == 1


# What can be an edge of a supernet or of a discrete cell. An operation that is added here needs no other change.
OPERATIONS = {
    NONE: Operation(compiled=True),                                  # zero
    'max_pool_3x3': Operation(pool=max_pool, compiled=True),
    'avg_pool_3x3': Operation(pool=avg_pool, compiled=True),
    'skip_connect': Operation(skip_connect, identity=True, compiled=True),
    'sep_conv_3x3': Operation(partial(SepConv, kernel=3), compiled=True),
    'sep_conv_5x5': Operation(partial(SepConv, kernel=5), compiled=True),
    'sep_conv_7x7': Operation(partial(SepConv, kernel=7), compiled=True),
    'dil_conv_3x3': Operation(partial(DilConv, kernel=3), compiled=True),
    'dil_conv_5x5': Operation(partial(DilConv, kernel=5), compiled=True),
    'conv_7x1_1x7': Operation(Conv7x1_1x7),
}


def check_known(names: Iterable[str]) -> None:
    """Raises UserError for a name that is not in OPERATIONS, and for an entry that contradicts itself."""
    for name in names:
        if name not in OPERATIONS:
            raise UserError(f"unknown operation {name!r}: operations.OPERATIONS has {', '.join(OPERATIONS)}")
        entry = OPERATIONS[name]
        if entry.build and entry.pool or entry.identity and not entry.build:
            raise UserError(f"operations.OPERATIONS[{name!r}] needs either `build` or `pool`, and `build` for stride 2 "
                            "if it is the identity")


def add_arguments(parser: argparse.ArgumentParser, with_defaults: bool = True) -> None:
    """Adds --primitives and --nodes, the fields of a genotypes.SearchSpace; without defaults, None when not given."""
    default = DARTS_SPACE.as_dict() if with_defaults else {}
    names = ','.join(default.get('primitives', ()))
    parser.add_argument('--primitives', type=primitive_names, default=default.get('primitives'), metavar='A,B,...',
                        help="operations on every edge, in the order of the columns of alpha, from "
                             f"{', '.join(OPERATIONS)} ({names or 'those of the file'})")
    parser.add_argument('--nodes', type=utils.number(int, 1, 100), default=default.get('nodes'),
                        help=f"number of intermediate nodes of a cell ({default.get('nodes', 'that of the file')})")


def primitive_names(text: str) -> list[str]:
    """Parses the value of --primitives, names of operations with commas between them."""
    names = [name.strip() for name in text.split(',')]
    try:
        check_known(names)
        SearchSpace(tuple(names))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def not_compiled(names: Iterable[str]) -> list[str]:
    """Returns those of the operations that the compiled operators do not compute."""
    return [name for name in names if not OPERATIONS[name].compiled]


def operation(name: str, layout: FlatParameters, prefix: str, channels: int, stride: int) -> Callable:
    """Returns the operation `name` on one edge of a discrete network, a function of x [N, C, H, W].

    The result has the shape of x, with stride 2 half its height and width. Every BN has a scale and a shift.
    Raises UserError for a name that is not in OPERATIONS.
    """
    check_known([name])
    entry = OPERATIONS[name]
    if entry.has_weights(stride):
        function = entry.build(layout, [prefix], channels, stride, affine=True)
        return lambda x: function(States(x))
    if entry.is_identity(stride):
        return lambda x: x
    if entry.pool:
        return lambda x: entry.pool(x, stride)
    return lambda x: paddle.zeros_like(x[:, :, ::stride, ::stride])


def preprocess(layout: FlatParameters, prefix: str, c_in: int, c_out: int, reduction_prev: bool) -> Callable:
    """Returns the preprocessing of an input of a discrete network's cell, from c_in to c_out channels.

    reduction_prev: whether it halves height and width too, as s0 needs it after a reduction cell.
    """
    if reduction_prev:
        reduce = FactorizedReduce(layout, [prefix], c_in, c_out, affine=True)
        return lambda x: reduce(States(x))
    return ReLUConvBN(layout, [prefix], c_in, c_out, affine=True)


def drop_path_masks(count, edges: int, keep):
    """Returns the factors of edges in drop path (arXiv 1605.07648): a variable [count, edges, 1, 1].

    An element is 1 / keep with probability keep, otherwise 0, so its expectation is 1. keep is a variable [1]. The
    masks are drawn on the device from the generator that paddle.seed sets.
    """
    uniform = paddle.uniform([count, edges, 1, 1], dtype=keep.dtype, min=0.0, max=1.0)
    if uniform.shape[1] < 0:        # Paddle 2 forgets the sizes that it knows, and the estimate of memory needs them
        uniform = uniform.reshape([-1, edges, 1, 1])
    return (uniform < keep).astype(keep.dtype) / keep
