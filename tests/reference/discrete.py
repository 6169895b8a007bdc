"""The discrete networks (DARTS, arXiv 1806.09055, sections 3.2 and 3.3), operation by operation.

This is the definition that the tests compare the static programs of model.py with. It runs in Paddle's dynamic mode in
float64 and shares no code with the programs. Weights and running statistics are {name: array}, named as by the authors.
"""
import contextlib
from collections import namedtuple

import numpy as np
import paddle
import paddle.nn.functional as F

from engine import custom_ops
from operations import not_compiled
from reference.supernet import EPSILON, average_pool

# The part of the running statistics that is kept; like EPSILON, Paddle stores it in single precision.
MOMENTUM = float(np.float32(0.9))
STATISTICS = ('.running_mean', '.running_var')

Training = namedtuple('Training', 'loss logits gradients statistics')
Evaluation = namedtuple('Evaluation', 'logits multiply_adds')
Edge = namedtuple('Edge', 'output input_gradient gradients statistics')


class Shapes(dict):
    """{name: shape} of weights and running statistics; each method adds those of one layer or operation."""

    def conv(self, name, c_out, c_in, *kernel, norm=None):
        """Adds a convolution and, with a name `norm`, the batch normalisation of its output."""
        self[f'{name}.weight'] = (c_out, c_in, *kernel)
        if norm:
            self.norm(norm, c_out)

    def norm(self, name, channels):
        for kind in ('.weight', '.bias', *STATISTICS):
            self[name + kind] = (channels,)

    def classifier(self, name, classes, features):
        self[f'{name}.weight'], self[f'{name}.bias'] = (classes, features), (classes,)

    def factorized_reduce(self, name, c_in, c_out):
        self.conv(f'{name}.conv_1', c_out // 2, c_in, 1, 1)
        self.conv(f'{name}.conv_2', c_out // 2, c_in, 1, 1)
        self.norm(f'{name}.bn', c_out)

    def relu_conv_bn(self, name, c_in, c_out):
        self.conv(f'{name}.op.1', c_out, c_in, 1, 1, norm=f'{name}.op.2')

    def operation(self, kind, name, channels, stride):
        if kind == 'skip_connect' and stride == 2:
            self.factorized_reduce(name, channels, channels)
        elif kind == 'conv_7x1_1x7':
            self.conv(f'{name}.1', channels, channels, 1, 7)
            self.conv(f'{name}.2', channels, channels, 7, 1, norm=f'{name}.3')
        elif kind.startswith(('sep_conv', 'dil_conv')):
            size = int(kind[-1])
            for n in (1, 5) if kind.startswith('sep') else (1,):
                self.conv(f'{name}.op.{n}', channels, 1, size, size)
                self.conv(f'{name}.op.{n + 1}', channels, channels, 1, 1, norm=f'{name}.op.{n + 2}')


# {side of its input: kernel and stride of its pool, which covers the input and gives 2 x 2}; 8 and 7: the authors'
POOLS_OF_AUXILIARY_HEAD = {8: (5, 3), 7: (5, 2), 2: (1, 1), 3: (2, 1), 4: (3, 1), 6: (4, 2), 12: (8, 4), 16: (10, 6)}


def weight_shapes(genotype, channels, classes, layers, imagenet=False, auxiliary=False):
    """Returns {name: shape} of all weights and running statistics of a network."""
    shapes = Shapes()
    if imagenet:
        shapes.conv('stem0.0', channels // 2, 3, 3, 3, norm='stem0.1')
        shapes.conv('stem0.3', channels, channels // 2, 3, 3, norm='stem0.4')
        shapes.conv('stem1.1', channels, channels, 3, 3, norm='stem1.2')
        widths = [channels, channels]
    else:
        shapes.conv('stem.0', 3 * channels, 3, 3, 3, norm='stem.1')
        widths = [3 * channels, 3 * channels]
    for i, reduction, reduction_prev, edges, concat in cells(genotype, layers, imagenet):
        channels *= 2 if reduction else 1
        preprocess0 = shapes.factorized_reduce if reduction_prev else shapes.relu_conv_bn
        preprocess0(f'cells.{i}.preprocess0', widths[-2], channels)
        shapes.relu_conv_bn(f'cells.{i}.preprocess1', widths[-1], channels)
        for n, (kind, _, stride) in enumerate(edges):
            shapes.operation(kind, f'cells.{i}._ops.{n}', channels, stride)
        widths.append(len(concat) * channels)
        if auxiliary and i == 2 * layers // 3:
            shapes.conv('auxiliary_head.features.2', 128, widths[-1], 1, 1, norm='auxiliary_head.features.3')
            shapes.conv('auxiliary_head.features.5', 768, 128, 2, 2,
                        norm=None if imagenet else 'auxiliary_head.features.6')
            shapes.classifier('auxiliary_head.classifier', classes, 768)
    shapes.classifier('classifier', classes, widths[-1])
    return dict(shapes)


def cells(genotype, layers, imagenet=False):
    """Yields (index, reduction, reduction_prev, edges as (operation, state, stride), output states) of each cell."""
    reduction_prev = imagenet
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        edges = [(kind, state, 2 if reduction and state < 2 else 1)
                 for kind, state in (genotype.reduce if reduction else genotype.normal)]
        yield i, reduction, reduction_prev, edges, genotype.reduce_concat if reduction else genotype.normal_concat
        reduction_prev = reduction


def droppable_edges(genotype, layers):
    """Returns (cell, edge) of all edges other than identities, in order."""
    return [(i, n) for i, _, _, edges, _ in cells(genotype, layers) for n, (kind, _, stride) in enumerate(edges)
            if kind != 'skip_connect' or stride == 2]


class Pass:
    """One pass over a batch.

    w: {name: tensor}. training: whether to normalise by the batch and record the updated running statistics in
    `statistics`; otherwise the running statistics normalise. multiply_adds: of convolutions and classifiers, per image.
    """

    def __init__(self, w, training):
        self.w, self.training = w, training
        self.statistics, self.multiply_adds = {}, 0

    def conv(self, x, name, **settings):
        weight = self.w[f'{name}.weight']
        x = F.conv2d(x, weight, **settings)
        self.multiply_adds += x.shape[2] * x.shape[3] * int(np.prod(weight.shape))
        return x

    def norm(self, x, name):
        mean, variance, scale, shift = (self.w[name + kind].reshape([1, -1, 1, 1])
                                        for kind in (*STATISTICS, '.weight', '.bias'))
        if self.training:
            running = mean, variance
            mean = x.mean(axis=[0, 2, 3], keepdim=True)
            variance = ((x - mean) ** 2).mean(axis=[0, 2, 3], keepdim=True)
            # Paddle on the CPU keeps the variance that it divides by; PyTorch keeps the unbiased estimate.
            for kind, before, now in zip(STATISTICS, running, (mean, variance)):
                self.statistics[name + kind] = (MOMENTUM * before + (1 - MOMENTUM) * now).flatten().numpy()
        return (x - mean) / paddle.sqrt(variance + EPSILON) * scale + shift

    def classifier(self, x, name):
        weight = self.w[f'{name}.weight']
        self.multiply_adds += int(np.prod(weight.shape))
        return paddle.matmul(x, weight, transpose_y=True) + self.w[f'{name}.bias']

    def factorized_reduce(self, x, name):
        x = F.relu(x)
        halves = [self.conv(x, f'{name}.conv_1', stride=2), self.conv(x[:, :, 1:, 1:], f'{name}.conv_2', stride=2)]
        return self.norm(paddle.concat(halves, axis=1), f'{name}.bn')

    def relu_conv_bn(self, x, name):
        return self.norm(self.conv(F.relu(x), f'{name}.op.1'), f'{name}.op.2')

    def separable(self, x, name, n, size, stride, dilation):
        x = self.conv(F.relu(x), f'{name}.op.{n}', stride=stride, padding=dilation * (size - 1) // 2,
                      dilation=dilation, groups=x.shape[1])
        return self.norm(self.conv(x, f'{name}.op.{n + 1}'), f'{name}.op.{n + 2}')

    def operation(self, kind, x, name, stride):
        if kind == 'none':
            return 0 * x[:, :, ::stride, ::stride]
        if kind == 'max_pool_3x3':
            return F.max_pool2d(x, 3, stride=stride, padding=1)
        if kind == 'avg_pool_3x3':
            return average_pool(x, stride)
        if kind == 'skip_connect':
            return x if stride == 1 else self.factorized_reduce(x, name)
        if kind == 'conv_7x1_1x7':
            x = self.conv(F.relu(x), f'{name}.1', stride=[1, stride], padding=[0, 3])
            return self.norm(self.conv(x, f'{name}.2', stride=[stride, 1], padding=[3, 0]), f'{name}.3')
        size = int(kind[-1])
        if kind.startswith('dil_conv'):
            return self.separable(x, name, 1, size, stride, dilation=2)
        x = self.separable(x, name, 1, size, stride, dilation=1)
        return self.separable(x, name, 5, size, 1, dilation=1)

    def cell(self, s0, s1, i, reduction_prev, edges, concat, masks):
        preprocess0 = self.factorized_reduce if reduction_prev else self.relu_conv_bn
        states = [preprocess0(s0, f'cells.{i}.preprocess0'), self.relu_conv_bn(s1, f'cells.{i}.preprocess1')]
        results, by_paddle = [], bool(not_compiled(kind for kind, _, _ in edges))
        for n, (kind, state, stride) in enumerate(edges):
            # The average pool of the reference depends on the operators that compute the cell (`average_pool`).
            with custom_ops.disabled() if by_paddle else contextlib.nullcontext():
                x = self.operation(kind, states[state], f'cells.{i}._ops.{n}', stride)
            if (i, n) in masks:
                x = x * paddle.to_tensor(masks[i, n]).reshape([-1, 1, 1, 1])
            results.append(x)
            if n % 2 == 1:                                          # two edges per node
                states.append(sum(results[-2:]))
        return paddle.concat([states[state] for state in concat], axis=1)

    def stem(self, images, imagenet):
        if not imagenet:
            x = self.norm(self.conv(images, 'stem.0', padding=1), 'stem.1')
            return x, x
        x = F.relu(self.norm(self.conv(images, 'stem0.0', stride=2, padding=1), 'stem0.1'))
        s0 = self.norm(self.conv(x, 'stem0.3', stride=2, padding=1), 'stem0.4')
        return s0, self.norm(self.conv(F.relu(s0), 'stem1.1', stride=2, padding=1), 'stem1.2')

    def auxiliary_head(self, x, imagenet):
        name = 'auxiliary_head.features'
        kernel, stride = POOLS_OF_AUXILIARY_HEAD[x.shape[2]]
        x = F.avg_pool2d(F.relu(x), kernel, stride)
        x = F.relu(self.norm(self.conv(x, f'{name}.2'), f'{name}.3'))
        x = self.conv(x, f'{name}.5')
        x = F.relu(x if imagenet else self.norm(x, f'{name}.6'))
        return self.classifier(x.flatten(1), 'auxiliary_head.classifier')

    def network(self, images, genotype, layers, imagenet, auxiliary=0.0, masks=None):
        """Returns the logits [N, classes] and those of the auxiliary head, None without one."""
        s0, s1 = self.stem(paddle.to_tensor(np.asarray(images, 'float64')), imagenet)
        auxiliary_logits = None
        for i, _, reduction_prev, edges, concat in cells(genotype, layers, imagenet):
            s0, s1 = s1, self.cell(s0, s1, i, reduction_prev, edges, concat, masks or {})
            if auxiliary and i == 2 * layers // 3:
                auxiliary_logits = self.auxiliary_head(s1, imagenet)
        return self.classifier(s1.mean(axis=[2, 3]), 'classifier'), auxiliary_logits

    def gradients(self):
        return {name: tensor.grad.numpy() for name, tensor in self.w.items() if not tensor.stop_gradient}


def smoothed_loss(logits, labels, smoothing):
    """Returns the mean cross entropy with (1 - smoothing) one_hot + smoothing / classes."""
    log_likelihood = logits - paddle.log(paddle.exp(logits).sum(axis=1, keepdim=True))
    classes = logits.shape[1]
    targets = (1 - smoothing) * np.eye(classes)[np.ravel(labels)] + smoothing / classes
    return -(log_likelihood * paddle.to_tensor(targets)).sum() / len(targets)


def tensors(weights, trainable):
    """Returns {name: tensor}; running statistics have no gradients."""
    return {name: paddle.to_tensor(array, 'float64', stop_gradient=not trainable or name.endswith(STATISTICS))
            for name, array in weights.items()}


def train(weights, genotype, images, labels, layers, imagenet=False, auxiliary=0.0, smoothing=0.0, masks=None):
    """Returns the Training of a batch in numpy, with gradients and updated running statistics by name.

    auxiliary: weight of the auxiliary head's loss, 0 for no auxiliary head. masks: None, or the factors of drop path
    {(cell, edge): [N]} for all `droppable_edges`.
    """
    with paddle.base.dygraph.guard():
        run = Pass(tensors(weights, trainable=True), training=True)
        logits, auxiliary_logits = run.network(images, genotype, layers, imagenet, auxiliary, masks)
        loss = smoothed_loss(logits, labels, smoothing)
        if auxiliary:
            loss = loss + auxiliary * smoothed_loss(auxiliary_logits, labels, smoothing)
        loss.backward()
        return Training(float(loss), logits.numpy(), run.gradients(), run.statistics)


def evaluate(weights, genotype, images, layers, imagenet=False):
    """Returns the Evaluation of images with the running statistics; multiply_adds is per image."""
    with paddle.base.dygraph.guard():
        run = Pass(tensors(weights, trainable=False), training=False)
        logits, _ = run.network(images, genotype, layers, imagenet)
        return Evaluation(logits.numpy(), run.multiply_adds)


def edge(weights, kind, x, direction, stride, training):
    """Returns the Edge of one operation: output, and gradients of sum(output * direction). Its weights are 'edge.…'."""
    with paddle.base.dygraph.guard():
        x = paddle.to_tensor(x, stop_gradient=False)
        run = Pass(tensors(weights, trainable=True), training)
        output = run.operation(kind, x, 'edge', stride)
        (output * paddle.to_tensor(direction)).sum().backward()
        return Edge(output.numpy(), x.grad.numpy(), run.gradients(), run.statistics)
