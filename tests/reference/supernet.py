"""The supernet of DARTS (arXiv 1806.09055, section 2), edge by edge and operation by operation.

This is the definition that the tests compare the batched static program of model_search.py with. It runs in Paddle's
dynamic mode in float64 and shares no code with the program. Weights are {name: array}, named as in the authors' code:

    stem.{0,1}                              convolution and batch normalisation
    cells.{i}.preprocess{0,1}               preprocessing of the outputs of the two cells before cell i
    cells.{i}._ops.{edge}._ops.{k}          primitive k on an edge; edges are numbered by node, then by state
    classifier                              linear layer

The search space is given by the names of the primitives and the number of nodes; the default is that of the paper.
With partial channels k > 1 it is the supernet of PC-DARTS (arXiv 1907.05737).
Sizes in the comments: N images, C channels of the cell, H x W pixels.
"""
import numpy as np
import paddle
import paddle.nn.functional as F

from engine import custom_ops

# Paddle stores the epsilon of its batch normalisation in single precision, which is 2.5e-8 away from 1e-5.
EPSILON = float(np.float32(1e-5))

STANDARD = ('none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect',
            'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5')


def cells(channels, layers, nodes):
    """Yields (index, channels of s0, channels of s1, C, reduction, reduction_prev) of each cell."""
    c_prev_prev = c_prev = 3 * channels
    reduction_prev = False
    for i in range(layers):
        reduction = i == layers // 3 or i == 2 * layers // 3
        channels = 2 * channels if reduction else channels
        yield i, c_prev_prev, c_prev, channels, reduction, reduction_prev
        c_prev_prev, c_prev, reduction_prev = c_prev, nodes * channels, reduction


def weight_shapes(channels, classes, layers, primitives=STANDARD, nodes=4, partial=1):
    """Returns {name: shape} of all weights."""
    shapes = {'stem.0.weight': (3 * channels, 3, 3, 3), 'stem.1.weight': (3 * channels,),
              'stem.1.bias': (3 * channels,)}
    for i, c_prev_prev, c_prev, c, reduction, reduction_prev in cells(channels, layers, nodes):
        if reduction_prev:
            shapes[f'cells.{i}.preprocess0.conv_1.weight'] = (c // 2, c_prev_prev, 1, 1)
            shapes[f'cells.{i}.preprocess0.conv_2.weight'] = (c // 2, c_prev_prev, 1, 1)
        else:
            shapes[f'cells.{i}.preprocess0.op.1.weight'] = (c, c_prev_prev, 1, 1)
        shapes[f'cells.{i}.preprocess1.op.1.weight'] = (c, c_prev, 1, 1)
        edge, operated = 0, c // partial
        for node in range(nodes):
            for state in range(2 + node):
                for k, name in enumerate(primitives):
                    prefix = f'cells.{i}._ops.{edge}._ops.{k}'
                    if name == 'skip_connect' and reduction and state < 2:
                        shapes[f'{prefix}.conv_1.weight'] = shapes[f'{prefix}.conv_2.weight'] = (
                            operated // 2, operated, 1, 1)
                    if name.startswith(('sep_conv', 'dil_conv')):
                        for n in (1, 5) if name.startswith('sep_conv') else (1,):
                            shapes[f'{prefix}.op.{n}.weight'] = (operated, 1, int(name[-1]), int(name[-1]))
                            shapes[f'{prefix}.op.{n + 1}.weight'] = (operated, operated, 1, 1)
                edge += 1
    shapes['classifier.weight'] = (classes, nodes * c)
    shapes['classifier.bias'] = (classes,)
    return shapes


def batch_norm(x):
    """Normalises x [N, C, H, W] per channel by mean and variance of the batch, without scale and shift."""
    mean = x.mean(axis=[0, 2, 3], keepdim=True)
    variance = ((x - mean) ** 2).mean(axis=[0, 2, 3], keepdim=True)
    return (x - mean) / paddle.sqrt(variance + EPSILON)


def average_pool(x, stride):
    """Averages over 3 x 3 pixels; the padding of 1 is not counted."""
    if not custom_ops.enabled():
        # The program under test uses Paddle's operator, whose gradient is scaled in single precision and 2.5e-8 off.
        return F.avg_pool2d(x, 3, stride=stride, padding=1, exclusive=True)
    kernel = paddle.ones([x.shape[1], 1, 3, 3], x.dtype)
    total, count = (F.conv2d(image, kernel, stride=stride, padding=1, groups=x.shape[1])
                    for image in (x, paddle.ones_like(x)))
    return total / count


def factorized_reduce(x, weights, prefix):
    """Halves height and width: ReLU, two 1x1 convolutions with stride 2 on grids one pixel apart, concatenation, BN."""
    x = F.relu(x)
    halves = [F.conv2d(x, weights[f'{prefix}.conv_1.weight'], stride=2),
              F.conv2d(x[:, :, 1:, 1:], weights[f'{prefix}.conv_2.weight'], stride=2)]
    return batch_norm(paddle.concat(halves, axis=1))


def relu_conv_bn(x, weights, prefix):
    """ReLU, 1x1 convolution, BN."""
    return batch_norm(F.conv2d(F.relu(x), weights[f'{prefix}.op.1.weight']))


def separable(x, weights, prefix, n, size, stride, dilation):
    """ReLU, depthwise convolution op.n of size x size, pointwise convolution op.(n + 1), BN."""
    x = F.conv2d(F.relu(x), weights[f'{prefix}.op.{n}.weight'], stride=stride, padding=dilation * (size // 2),
                 dilation=dilation, groups=x.shape[1])
    return batch_norm(F.conv2d(x, weights[f'{prefix}.op.{n + 1}.weight']))


def operation(name, x, weights, prefix, stride):
    """Returns a primitive other than none on x; prefix: of the names of its weights."""
    if name == 'max_pool_3x3':
        return batch_norm(F.max_pool2d(x, 3, stride=stride, padding=1))
    if name == 'avg_pool_3x3':
        return batch_norm(average_pool(x, stride))
    if name == 'skip_connect':
        return x if stride == 1 else factorized_reduce(x, weights, prefix)
    kind, _, size = name.partition('_conv_')
    if kind == 'dil':
        return separable(x, weights, prefix, 1, int(size[0]), stride, dilation=2)
    assert kind == 'sep'
    x = separable(x, weights, prefix, 1, int(size[0]), stride, dilation=1)
    return separable(x, weights, prefix, 5, int(size[0]), stride=1, dilation=1)


def shuffle(x, groups):
    """Interleaves groups of channels: channel q of group k, k * C / groups + q, becomes channel q * groups + k."""
    order = [k * (x.shape[1] // groups) + q for q in range(x.shape[1] // groups) for k in range(groups)]
    return paddle.concat([x[:, channel:channel + 1] for channel in order], axis=1)


def cell(s0, s1, weights, prefix, alpha, beta, reduction, reduction_prev, primitives, nodes, partial):
    """Returns the output [N, nodes * C, H', W'] of a cell from the outputs of the two cells before it.

    alpha: [edges, primitives]; beta: [edges], or None without partial channels.
    """
    mixing = paddle.exp(alpha) / paddle.exp(alpha).sum(axis=1, keepdim=True)          # softmax per edge
    preprocess0 = factorized_reduce if reduction_prev else relu_conv_bn
    states = [preprocess0(s0, weights, f'{prefix}.preprocess0'),
              relu_conv_bn(s1, weights, f'{prefix}.preprocess1')]
    edge = 0
    for node in range(nodes):
        total = 0
        for j, state in enumerate(states):
            stride = 2 if reduction and j < 2 else 1
            operated = state[:, :state.shape[1] // partial]
            mixed = None
            for k, name in enumerate(primitives):
                if name != 'none':                                                    # none is zero
                    result = operation(name, operated, weights, f'{prefix}._ops.{edge}._ops.{k}', stride)
                    result = mixing[edge, k] * result
                    mixed = result if mixed is None else mixed + result
            if partial > 1:
                rest = state[:, state.shape[1] // partial:]
                rest = F.max_pool2d(rest, 2, 2) if stride == 2 else rest
                of_node = paddle.exp(beta[edge - j:edge - j + 2 + node])                  # of all edges of the node
                mixed = of_node[j] / of_node.sum() * shuffle(paddle.concat([mixed, rest], axis=1), partial)
            total = total + mixed
            edge += 1
        states.append(total)
    return paddle.concat(states[2:], axis=1)


def forward(weights, alphas, images, channels, layers, primitives=STANDARD, nodes=4, partial=1):
    """Returns the logits [N, classes] of images [N, 3, H, W]; weights and alphas {name: tensor}, images a tensor."""
    x = batch_norm(F.conv2d(images, weights['stem.0.weight'], padding=1))
    x = x * weights['stem.1.weight'].reshape([1, -1, 1, 1]) + weights['stem.1.bias'].reshape([1, -1, 1, 1])
    s0 = s1 = x
    for i, _, _, _, reduction, reduction_prev in cells(channels, layers, nodes):
        kind = 'reduce' if reduction else 'normal'
        s0, s1 = s1, cell(s0, s1, weights, f'cells.{i}', alphas[f'alphas_{kind}'], alphas.get(f'betas_{kind}'),
                          reduction, reduction_prev, primitives, nodes, partial)
    features = s1.mean(axis=[2, 3])                                                   # [N, nodes * C]
    return paddle.matmul(features, weights['classifier.weight'], transpose_y=True) + weights['classifier.bias']


def gradients(weights, alphas, images, labels, channels, layers, primitives=STANDARD, nodes=4, partial=1):
    """Returns (loss, logits, {name: gradient of a weight}, {name: gradient of an alpha}), numpy float64.

    weights: {name: array}; alphas: {'alphas_normal', 'alphas_reduce': [edges, primitives]}, with partial channels also
    {'betas_normal', 'betas_reduce': [edges]}; images: [N, 3, H, W]; labels: [N] or [N, 1]. The loss is the mean cross
    entropy.
    """
    def variables(arrays):
        return {name: paddle.to_tensor(np.asarray(array, 'float64'), stop_gradient=False)
                for name, array in arrays.items()}

    with paddle.base.dygraph.guard():
        w, a = variables(weights), variables(alphas)
        logits = forward(w, a, paddle.to_tensor(np.asarray(images, 'float64')), channels, layers, primitives, nodes,
                         partial)
        log_likelihood = logits - paddle.log(paddle.exp(logits).sum(axis=1, keepdim=True))
        one_hot = paddle.to_tensor(np.eye(logits.shape[1])[np.ravel(labels)])
        loss = -(log_likelihood * one_hot).sum() / len(images)
        loss.backward()
        return (float(loss), logits.numpy(), {name: tensor.grad.numpy() for name, tensor in w.items()},
                {name: tensor.grad.numpy() for name, tensor in a.items()})
