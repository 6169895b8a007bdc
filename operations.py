"""The operations of the search space as builders of static graphs.

Every class here declares its weights when it is made and builds its operators when it is called. It
stands for n edges at once: `prefixes` names them, its input is [N, n * C, H, W] with edge e in the
channels e * C to (e + 1) * C, and its output is laid out alike. The supernet batches all edges that
leave a state this way; a discrete network has n = 1 (see `operation`). It is the same function as n
separate operations, in a fraction of the operators: a depthwise convolution and a batch normalisation
treat every channel on its own, and a pointwise convolution becomes a grouped one.
"""
import functools

import paddle
import paddle.nn.functional as F

from parameters import constant

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9                # of running statistics, in Paddle's sense: the part that is kept


def conv(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """x [N, C, H, W], weight a Block of [out, C / groups, k, k]; no bias."""
    x = F.conv2d(x, weight.tensor, None, stride, padding, dilation, groups)
    weight.uses += x.shape[2] * x.shape[3]
    return x


def linear(x, weight, bias):
    """x [N, features], weight and bias Blocks of [classes, features] and [classes] -> [N, classes]."""
    weight.uses += 1
    return paddle.matmul(x, weight.tensor, transpose_y=True) + bias.tensor


def mean_of_planes(x):
    """x [N, C, H, W] -> [N, C]. Over one axis: Paddle's CPU gradient of a mean over two takes ten times as long."""
    return paddle.mean(paddle.flatten(x, 2), axis=2)


class States:
    """States side by side, [N, C, H, W], in front of operations that begin with a ReLU.

    copies: how many edges leave each of them; the edges are numbered copy by copy.
    """

    def __init__(self, x, copies=1):
        self.x, self.copies = x, copies

    @functools.cached_property
    def rectified(self):
        """The input of all edges: [N, copies * C, H, W], made once a program."""
        x = F.relu(self.x)
        return paddle.tile(x, [1, self.copies, 1, 1]) if self.copies > 1 else x


def max_pool(x, stride):
    return F.max_pool2d(x, 3, stride, 1)


def avg_pool(x, stride):
    return F.avg_pool2d(x, 3, stride, 1, exclusive=True)  # padding is not counted


def batch_norm(x, scale=None, shift=None):
    """Normalises x [N, C, H, W] by the statistics of the batch (arXiv 1502.03167).

    scale, shift: variables [C]; without a scale neither is applied. A scale without a shift is how
    the weights of a mixed operation are multiplied in: softmax(alpha) * BN(x) costs nothing more.
    """
    channels = x.shape[1]
    # Paddle wants a scale and a shift, and both or neither with gradients.
    if scale is None:
        scale, shift = constant([channels], 1.0, x.dtype), constant([channels], 0.0, x.dtype)
    elif shift is None:
        shift = constant([channels], 0.0, x.dtype, trainable=True)
    # Running statistics are an input that cannot be left out; momentum 1 keeps these as they are.
    mean, variance = constant([channels], 0.0, x.dtype), constant([channels], 1.0, x.dtype)
    return F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=1.0, epsilon=BN_EPSILON)


class BatchNorm:
    """Batch normalisation of n edges of C channels; affine: with a scale and a shift to be trained.

    Where the layout keeps running statistics, a program for training updates them and any other
    normalises by them; elsewhere it is always the statistics of the batch.
    """

    def __init__(self, layout, prefixes, channels, affine):
        self.layout, self.scale, self.mean = layout, None, None
        if affine:
            self.scale = layout.declare([f'{p}.weight' for p in prefixes], [channels], value=1.0)
            self.shift = layout.declare([f'{p}.bias' for p in prefixes], [channels], value=0.0)
        if layout.statistics:
            self.mean = layout.statistics.declare([f'{p}.running_mean' for p in prefixes], [channels], value=0.0)
            self.variance = layout.statistics.declare([f'{p}.running_var' for p in prefixes], [channels], value=1.0)

    def __call__(self, x, scale=None):
        if self.mean is not None:
            # While training, the operator writes the new statistics over the tensors that it is given.
            return F.batch_norm(x, self.mean.tensor, self.variance.tensor, self.scale.tensor, self.shift.tensor,
                                training=self.layout.training, momentum=BN_MOMENTUM, epsilon=BN_EPSILON)
        if self.scale is not None:
            return batch_norm(x, self.scale.tensor, self.shift.tensor)
        return batch_norm(x, scale)


class ReLUConvBN:
    """ReLU, convolution 1x1 from c_in to c_out channels, BN: brings a cell's input to its width."""

    def __init__(self, layout, prefixes, c_in, c_out, affine):
        self.groups = len(prefixes)
        self.weight = layout.declare([f'{p}.op.1.weight' for p in prefixes], [c_out, c_in, 1, 1])
        self.norm = BatchNorm(layout, [f'{p}.op.2' for p in prefixes], c_out, affine)

    def convolve(self, x):
        """All but the BN."""
        return conv(F.relu(x), self.weight, groups=self.groups)

    def __call__(self, x):
        return self.norm(self.convolve(x))


class FactorizedReduce:
    """ReLU, two convolutions 1x1 with stride 2 on grids one pixel apart, side by side, BN.

    Halves height and width ([N, n * c_in, H, W] -> [N, n * c_out, H / 2, W / 2]) and looks at half
    of the pixels where a single convolution with stride 2 would look at a quarter.
    """

    def __init__(self, layout, prefixes, c_in, c_out, affine):
        self.edges, self.c_half = len(prefixes), c_out // 2
        self.first = layout.declare([f'{p}.conv_1.weight' for p in prefixes], [c_out // 2, c_in, 1, 1])
        self.second = layout.declare([f'{p}.conv_2.weight' for p in prefixes], [c_out // 2, c_in, 1, 1])
        self.norm = BatchNorm(layout, [f'{p}.bn' for p in prefixes], c_out, affine)

    def convolve(self, x):
        """All but the BN; x may be rectified already: a second ReLU is no change."""
        x = F.relu(x)
        first = conv(x, self.first, stride=2, groups=self.edges)
        second = conv(x[:, :, 1:, 1:], self.second, stride=2, groups=self.edges)
        if self.edges == 1:
            return paddle.concat([first, second], axis=1)
        # The halves of an edge belong together: [N, edges, c_half, H, W] twice -> [N, edges, c_out, H, W].
        height, width = first.shape[2:]
        halves = [paddle.reshape(h, [0, self.edges, self.c_half * height, width]) for h in (first, second)]
        return paddle.reshape(paddle.concat(halves, axis=2), [0, self.edges * self.c_half * 2, height, width])

    def __call__(self, x, scale=None):
        return self.norm(self.convolve(x), scale)


class SeparableConv:
    """ReLU, depthwise k x k, pointwise, BN, on `States`."""

    def __init__(self, layout, prefixes, channels, kernel, stride, affine, dilation, first):
        """first: the number of the depthwise convolution in the names of the authors' code."""
        self.edges, self.channels = len(prefixes), channels
        self.stride, self.dilation, self.padding = stride, dilation, dilation * (kernel // 2)
        self.depthwise = layout.declare(
            [f'{p}.op.{first}.weight' for p in prefixes], [channels, 1, kernel, kernel])
        self.pointwise = layout.declare(
            [f'{p}.op.{first + 1}.weight' for p in prefixes], [channels, channels, 1, 1])
        self.norm = BatchNorm(layout, [f'{p}.op.{first + 2}' for p in prefixes], channels, affine)

    def convolve(self, states):
        """All but the BN."""
        groups = self.edges * self.channels
        x = conv(states.rectified, self.depthwise, self.stride, self.padding, self.dilation, groups)
        return conv(x, self.pointwise, groups=self.edges)

    def __call__(self, states, scale=None):
        return self.norm(self.convolve(states), scale)


class DilConv(SeparableConv):
    """A separable convolution with dilation 2."""

    def __init__(self, layout, prefixes, channels, kernel, stride, affine):
        super().__init__(layout, prefixes, channels, kernel, stride, affine, dilation=2, first=1)


class SepConv:
    """Two separable convolutions, the second with stride 1."""

    def __init__(self, layout, prefixes, channels, kernel, stride, affine):
        self.first = SeparableConv(layout, prefixes, channels, kernel, stride, affine, dilation=1, first=1)
        self.second = SeparableConv(layout, prefixes, channels, kernel, 1, affine, dilation=1, first=5)

    def __call__(self, states, scale=None):
        return self.second(States(self.first(states)), scale)


class Conv7x1_1x7:
    """ReLU, convolutions 1 x 7 and 7 x 1, BN, on `States`: an operation of AmoebaNet (arXiv 1802.01548)."""

    def __init__(self, layout, prefixes, channels, stride, affine):
        self.edges, self.stride = len(prefixes), stride
        self.row = layout.declare([f'{p}.1.weight' for p in prefixes], [channels, channels, 1, 7])
        self.column = layout.declare([f'{p}.2.weight' for p in prefixes], [channels, channels, 7, 1])
        self.norm = BatchNorm(layout, [f'{p}.3' for p in prefixes], channels, affine)

    def __call__(self, states, scale=None):
        x = conv(states.rectified, self.row, [1, self.stride], [0, 3], groups=self.edges)
        return self.norm(conv(x, self.column, [self.stride, 1], [3, 0], groups=self.edges), scale)


def operation(name, layout, prefix, channels, stride):
    """The operation `name` on one edge of a discrete network: a function of x [N, C, H, W] -> the same shape
    (stride 2: half of it); every BN has a scale and a shift."""
    if name in ('max_pool_3x3', 'avg_pool_3x3'):
        pool = max_pool if name == 'max_pool_3x3' else avg_pool
        return lambda x: pool(x, stride)
    if name == 'skip_connect':
        return FactorizedReduce(layout, [prefix], channels, channels, affine=True) if stride == 2 else lambda x: x
    if name == 'conv_7x1_1x7':
        convolve = Conv7x1_1x7(layout, [prefix], channels, stride, affine=True)
    else:
        kind, kernel = {'sep_conv_3x3': (SepConv, 3), 'sep_conv_5x5': (SepConv, 5), 'sep_conv_7x7': (SepConv, 7),
                        'dil_conv_3x3': (DilConv, 3), 'dil_conv_5x5': (DilConv, 5)}[name]
        convolve = kind(layout, [prefix], channels, kernel, stride, affine=True)
    return lambda x: convolve(States(x))


def preprocess(layout, prefix, c_in, c_out, reduction_prev):
    """What brings an input of a discrete network's cell to its width and, behind a reduction cell, s0 to its size."""
    if reduction_prev:
        return FactorizedReduce(layout, [prefix], c_in, c_out, affine=True)
    return ReLUConvBN(layout, [prefix], c_in, c_out, affine=True)


def drop_path_masks(count, edges, keep):
    """What drop path (arXiv 1605.07648) multiplies the outputs of edges by: a variable [count, edges, 1, 1].

    An element is 1 / keep with probability keep, else 0: the expectation of a product is the factor. keep
    is a variable [1]. The masks are drawn on the device from the generator that paddle.seed sets.
    """
    uniform = paddle.uniform([count, edges, 1, 1], dtype=keep.dtype, min=0.0, max=1.0)
    return (uniform < keep).astype(keep.dtype) / keep
