"""The supernet as everybody writes it: edge by edge, operation by operation, in dynamic mode.

The reference of the tests, written from the definitions alone (DARTS, arXiv 1806.09055); it shares no
code with the program that it checks. Weights are {name: array} under the names of the authors' code.
"""
import numpy as np
import paddle
import paddle.nn.functional as F

from engine import custom_ops

EPSILON = float(np.float32(1e-5))          # an attribute of Paddle's operator, in single precision


def cells(channels, layers):
    """(index, c_prev_prev, c_prev, c, reduction, reduction_prev) of each cell."""
    c_pp = c_p = 3 * channels
    before = False
    for i in range(layers):
        reduction = i == layers // 3 or i == 2 * layers // 3
        channels = 2 * channels if reduction else channels
        yield i, c_pp, c_p, channels, reduction, before
        c_pp, c_p, before = c_p, 4 * channels, reduction


def weight_shapes(channels, classes, layers):
    shapes = {'stem.0.weight': (3 * channels, 3, 3, 3), 'stem.1.weight': (3 * channels,),
              'stem.1.bias': (3 * channels,)}
    for i, c_pp, c_p, c, reduction, before in cells(channels, layers):
        if before:
            shapes[f'cells.{i}.preprocess0.conv_1.weight'] = (c // 2, c_pp, 1, 1)
            shapes[f'cells.{i}.preprocess0.conv_2.weight'] = (c // 2, c_pp, 1, 1)
        else:
            shapes[f'cells.{i}.preprocess0.op.1.weight'] = (c, c_pp, 1, 1)
        shapes[f'cells.{i}.preprocess1.op.1.weight'] = (c, c_p, 1, 1)
        edge = 0
        for node in range(4):
            for state in range(2 + node):
                p = f'cells.{i}._ops.{edge}._ops'
                if reduction and state < 2:
                    shapes[f'{p}.3.conv_1.weight'] = shapes[f'{p}.3.conv_2.weight'] = (c // 2, c, 1, 1)
                for k, size, stages in ((4, 3, (1, 5)), (5, 5, (1, 5)), (6, 3, (1,)), (7, 5, (1,))):
                    for n in stages:
                        shapes[f'{p}.{k}.op.{n}.weight'] = (c, 1, size, size)
                        shapes[f'{p}.{k}.op.{n + 1}.weight'] = (c, c, 1, 1)
                edge += 1
    shapes['classifier.weight'] = (classes, 4 * c)
    shapes['classifier.bias'] = (classes,)
    return shapes


def normalise(x):
    mean = x.mean(axis=[0, 2, 3], keepdim=True)
    variance = ((x - mean) ** 2).mean(axis=[0, 2, 3], keepdim=True)
    return (x - mean) / paddle.sqrt(variance + EPSILON)


def average_pool(x, stride):
    if not custom_ops.enabled():
        # Paddle's kernel scales its gradient in single precision, 2.5e-8 off: the reference has to be off alike.
        return F.avg_pool2d(x, 3, stride=stride, padding=1, exclusive=True)
    ones = paddle.ones([x.shape[1], 1, 3, 3], x.dtype)
    total, count = (F.conv2d(each, ones, stride=stride, padding=1, groups=x.shape[1])
                    for each in (x, paddle.ones_like(x)))
    return total / count


def factorized_reduce(x, w, p):
    x = F.relu(x)
    halves = [F.conv2d(x, w[f'{p}.conv_1.weight'], stride=2),
              F.conv2d(x[:, :, 1:, 1:], w[f'{p}.conv_2.weight'], stride=2)]
    return normalise(paddle.concat(halves, axis=1))


def relu_conv_bn(x, w, p):
    return normalise(F.conv2d(F.relu(x), w[f'{p}.op.1.weight']))


def separable(x, w, p, n, size, stride, dilation):
    """ReLU, depthwise, pointwise, BN."""
    x = F.conv2d(F.relu(x), w[f'{p}.op.{n}.weight'], stride=stride, padding=dilation * (size // 2),
                 dilation=dilation, groups=x.shape[1])
    return normalise(F.conv2d(x, w[f'{p}.op.{n + 1}.weight']))


def operation(k, x, w, p, stride):
    """Operation k of the search space on one edge; p: its prefix in the names of the weights."""
    if k == 0:
        return paddle.zeros_like(x[:, :, ::stride, ::stride])
    if k == 1:
        return normalise(F.max_pool2d(x, 3, stride=stride, padding=1))
    if k == 2:
        return normalise(average_pool(x, stride))
    if k == 3:
        return x if stride == 1 else factorized_reduce(x, w, p)
    size = 3 if k in (4, 6) else 5
    if k >= 6:
        return separable(x, w, p, 1, size, stride, 2)
    return separable(separable(x, w, p, 1, size, stride, 1), w, p, 5, size, 1, 1)


def forward(w, alphas_normal, alphas_reduce, images, channels, layers):
    x = normalise(F.conv2d(images, w['stem.0.weight'], padding=1))
    x = x * w['stem.1.weight'].reshape([1, -1, 1, 1]) + w['stem.1.bias'].reshape([1, -1, 1, 1])
    s0 = s1 = x
    for i, _, _, _, reduction, before in cells(channels, layers):
        alpha = alphas_reduce if reduction else alphas_normal
        mixing = paddle.exp(alpha) / paddle.exp(alpha).sum(axis=1, keepdim=True)
        preprocess0 = factorized_reduce if before else relu_conv_bn
        states = [preprocess0(s0, w, f'cells.{i}.preprocess0'), relu_conv_bn(s1, w, f'cells.{i}.preprocess1')]
        edge = 0
        for node in range(4):
            total = 0
            for j, state in enumerate(states):
                stride = 2 if reduction and j < 2 else 1
                for k in range(8):
                    total = total + mixing[edge, k] * operation(k, state, w, f'cells.{i}._ops.{edge}._ops.{k}', stride)
                edge += 1
            states.append(total)
        s0, s1 = s1, paddle.concat(states[2:], axis=1)
    return paddle.matmul(s1.mean(axis=[2, 3]), w['classifier.weight'], transpose_y=True) + w['classifier.bias']


def gradients(weights, alphas, images, labels, channels, layers):
    """-> (loss, logits, {name: gradient}, {name of alpha: gradient}), all numpy float64."""
    with paddle.base.dygraph.guard():
        def variable(array):
            return paddle.to_tensor(np.asarray(array, 'float64'), stop_gradient=False)
        w = {name: variable(array) for name, array in weights.items()}
        a = {name: variable(array) for name, array in alphas.items()}
        logits = forward(w, a['alphas_normal'], a['alphas_reduce'], paddle.to_tensor(np.asarray(images, 'float64')),
                         channels, layers)
        log_likelihood = logits - paddle.log(paddle.exp(logits).sum(axis=1, keepdim=True))
        one_hot = paddle.to_tensor(np.eye(logits.shape[1])[np.ravel(labels)])
        loss = -(log_likelihood * one_hot).sum() / len(images)
        loss.backward()
        return (float(loss), logits.numpy(), {name: v.grad.numpy() for name, v in w.items()},
                {name: v.grad.numpy() for name, v in a.items()})
