"""The discrete networks as everybody writes them, operation by operation, in dynamic mode and float64.

The reference of the tests, written from the definitions alone (DARTS, arXiv 1806.09055, sections 3.2 and
3.3); it shares no code with the programs that it checks. Weights and running statistics are {name: array}
under the names of the authors' code.
"""
import contextlib
from collections import namedtuple

import numpy as np
import paddle
import paddle.nn.functional as F

from engine import custom_ops
from reference.supernet import EPSILON, average_pool

# As EPSILON an attribute of Paddle's operator, in single precision: the part of running statistics that is kept.
MOMENTUM = float(np.float32(0.9))
STATISTICS = ('.running_mean', '.running_var')


# ---------------------------------------------------------------------------------------------------
# Names and shapes

class Shapes(dict):
    """{name: shape} of all weights and running statistics."""

    def conv(self, name, c_out, c_in, *kernel):
        self[f'{name}.weight'] = (c_out, c_in, *kernel)

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
        self.conv(f'{name}.op.1', c_out, c_in, 1, 1)
        self.norm(f'{name}.op.2', c_out)

    def operation(self, kind, name, channels, stride):
        if kind == 'skip_connect' and stride == 2:
            self.factorized_reduce(name, channels, channels)
        elif kind == 'conv_7x1_1x7':
            self.conv(f'{name}.1', channels, channels, 1, 7)
            self.conv(f'{name}.2', channels, channels, 7, 1)
            self.norm(f'{name}.3', channels)
        elif kind.startswith(('sep_conv', 'dil_conv')):
            size = int(kind[-1])
            for n in (1, 5) if kind.startswith('sep') else (1,):
                self.conv(f'{name}.op.{n}', channels, 1, size, size)
                self.conv(f'{name}.op.{n + 1}', channels, channels, 1, 1)
                self.norm(f'{name}.op.{n + 2}', channels)


def weight_shapes(genotype, channels, classes, layers, imagenet=False, auxiliary=False):
    shapes = Shapes()
    if imagenet:
        shapes.conv('stem0.0', channels // 2, 3, 3, 3)
        shapes.norm('stem0.1', channels // 2)
        shapes.conv('stem0.3', channels, channels // 2, 3, 3)
        shapes.norm('stem0.4', channels)
        shapes.conv('stem1.1', channels, channels, 3, 3)
        shapes.norm('stem1.2', channels)
        widths = [channels, channels]
    else:
        shapes.conv('stem.0', 3 * channels, 3, 3, 3)
        shapes.norm('stem.1', 3 * channels)
        widths = [3 * channels, 3 * channels]
    for i in range(layers):
        if is_reduction(i, layers):
            channels *= 2
        preprocess0 = shapes.factorized_reduce if follows_reduction(i, layers, imagenet) else shapes.relu_conv_bn
        preprocess0(f'cells.{i}.preprocess0', widths[-2], channels)
        shapes.relu_conv_bn(f'cells.{i}.preprocess1', widths[-1], channels)
        for n, kind, _, stride in edges(genotype, i, layers):
            shapes.operation(kind, f'cells.{i}._ops.{n}', channels, stride)
        concat = genotype.reduce_concat if is_reduction(i, layers) else genotype.normal_concat
        widths.append(len(concat) * channels)
        if auxiliary and i == 2 * layers // 3:
            shapes.conv('auxiliary_head.features.2', 128, widths[-1], 1, 1)
            shapes.norm('auxiliary_head.features.3', 128)
            shapes.conv('auxiliary_head.features.5', 768, 128, 2, 2)
            if not imagenet:
                shapes.norm('auxiliary_head.features.6', 768)
            shapes.classifier('auxiliary_head.classifier', classes, 768)
    shapes.classifier('classifier', classes, widths[-1])
    return dict(shapes)


def is_reduction(i, layers):
    return i == layers // 3 or i == 2 * layers // 3


def follows_reduction(i, layers, imagenet):
    return imagenet if i == 0 else is_reduction(i - 1, layers)


def edges(genotype, i, layers):
    """(number, operation, state, stride) of the edges of cell i."""
    if is_reduction(i, layers):
        return [(n, kind, state, 2 if state < 2 else 1) for n, (kind, state) in enumerate(genotype.reduce)]
    return [(n, kind, state, 1) for n, (kind, state) in enumerate(genotype.normal)]


def droppable_edges(genotype, layers):
    """(cell, edge) of all edges but the identities, in order."""
    return [(i, n) for i in range(layers) for n, kind, _, stride in edges(genotype, i, layers)
            if not (kind == 'skip_connect' and stride == 1)]


# ---------------------------------------------------------------------------------------------------
# The function

class Pass:
    """One pass over a batch.

    w: {name: tensor}; training: normalise by the batch, and leave in `statistics` what the running
    statistics become. `multiply_adds` counts what convolutions and classifiers multiply for one image.
    """

    def __init__(self, w, training):
        self.w, self.training = w, training
        self.statistics, self.multiply_adds = {}, 0

    def conv(self, x, name, **settings):
        weight = self.w[f'{name}.weight']
        x = F.conv2d(x, weight, **settings)
        c_out, height, width = x.shape[1:]
        self.multiply_adds += height * width * c_out * int(np.prod(weight.shape[1:]))
        return x

    def norm(self, x, name):
        def column(vector):
            return vector.reshape([1, -1, 1, 1])
        mean, variance = (self.w[name + kind] for kind in STATISTICS)
        if self.training:
            kept = mean, variance
            mean = x.mean(axis=[0, 2, 3])
            variance = ((x - column(mean)) ** 2).mean(axis=[0, 2, 3])
            # Paddle (on the CPU) keeps the variance that it divides by, PyTorch would keep the unbiased estimate.
            for kind, before, now in zip(STATISTICS, kept, (mean, variance)):
                self.statistics[name + kind] = (MOMENTUM * before + (1 - MOMENTUM) * now).numpy()
        x = (x - column(mean)) / paddle.sqrt(column(variance) + EPSILON)
        return x * column(self.w[f'{name}.weight']) + column(self.w[f'{name}.bias'])

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

    def cell(self, s0, s1, genotype, i, layers, imagenet, masks):
        preprocess0 = self.factorized_reduce if follows_reduction(i, layers, imagenet) else self.relu_conv_bn
        states = [preprocess0(s0, f'cells.{i}.preprocess0'), self.relu_conv_bn(s1, f'cells.{i}.preprocess1')]
        droppable = droppable_edges(genotype, layers) if masks else []
        by_paddle = not custom_ops.OPERATIONS.issuperset(kind for _, kind, _, _ in edges(genotype, i, layers))
        for n, kind, state, stride in edges(genotype, i, layers):
            # Which average pool is the reference depends on whose operators compute the cell.
            with custom_ops.disabled() if by_paddle else contextlib.nullcontext():
                x = self.operation(kind, states[state], f'cells.{i}._ops.{n}', stride)
            if (i, n) in droppable:
                x = x * paddle.to_tensor(masks[i, n]).reshape([-1, 1, 1, 1])
            if n % 2 == 0:
                states.append(x)
            else:
                states[-1] = states[-1] + x
        concat = genotype.reduce_concat if is_reduction(i, layers) else genotype.normal_concat
        return paddle.concat([states[number] for number in concat], axis=1)

    def stem(self, images, imagenet):
        if not imagenet:
            x = self.norm(self.conv(images, 'stem.0', padding=1), 'stem.1')
            return x, x
        x = F.relu(self.norm(self.conv(images, 'stem0.0', stride=2, padding=1), 'stem0.1'))
        s0 = self.norm(self.conv(x, 'stem0.3', stride=2, padding=1), 'stem0.4')
        return s0, self.norm(self.conv(F.relu(s0), 'stem1.1', stride=2, padding=1), 'stem1.2')

    def auxiliary_head(self, x, imagenet):
        name = 'auxiliary_head.features'
        x = F.avg_pool2d(F.relu(x), 5, stride=2 if imagenet else 3)
        x = F.relu(self.norm(self.conv(x, f'{name}.2'), f'{name}.3'))
        x = self.conv(x, f'{name}.5')
        x = F.relu(x if imagenet else self.norm(x, f'{name}.6'))
        return self.classifier(x.reshape([len(x), -1]), 'auxiliary_head.classifier')

    def network(self, images, genotype, layers, imagenet, auxiliary, masks):
        """-> logits, and those of the auxiliary head, if there is one."""
        s0, s1 = self.stem(images, imagenet)
        auxiliary_logits = None
        for i in range(layers):
            s0, s1 = s1, self.cell(s0, s1, genotype, i, layers, imagenet, masks)
            if auxiliary and i == 2 * layers // 3:
                auxiliary_logits = self.auxiliary_head(s1, imagenet)
        return self.classifier(s1.mean(axis=[2, 3]), 'classifier'), auxiliary_logits


def smoothed_loss(logits, labels, smoothing):
    log_likelihood = logits - paddle.log(paddle.exp(logits).sum(axis=1, keepdim=True))
    classes = logits.shape[1]
    targets = (1 - smoothing) * np.eye(classes)[np.ravel(labels)] + smoothing / classes
    return -(log_likelihood * paddle.to_tensor(targets)).sum() / len(targets)


def tensors(weights, trainable):
    """{name: tensor}; running statistics are never trained."""
    return {name: paddle.to_tensor(np.asarray(array, 'float64'),
                                   stop_gradient=not trainable or name.endswith(STATISTICS))
            for name, array in weights.items()}


def gradients_of(w):
    return {name: tensor.grad.numpy() for name, tensor in w.items() if not tensor.stop_gradient}


Training = namedtuple('Training', 'loss logits gradients statistics')
Evaluation = namedtuple('Evaluation', 'logits multiply_adds')
Edge = namedtuple('Edge', 'output input_gradient gradients statistics')


def train(weights, genotype, images, labels, layers, imagenet=False, auxiliary=0.0, smoothing=0.0, masks=None):
    """Training, all numpy: gradients and new running statistics by name.

    auxiliary: the weight of the auxiliary head's loss; masks: {(cell, edge): [N]}, see `droppable_edges`.
    """
    with paddle.base.dygraph.guard():
        w = tensors(weights, trainable=True)
        run = Pass(w, training=True)
        logits, auxiliary_logits = run.network(paddle.to_tensor(np.asarray(images, 'float64')), genotype, layers,
                                               imagenet, auxiliary, masks)
        loss = smoothed_loss(logits, labels, smoothing)
        if auxiliary:
            loss = loss + auxiliary * smoothed_loss(auxiliary_logits, labels, smoothing)
        loss.backward()
        return Training(float(loss), logits.numpy(), gradients_of(w), run.statistics)


def evaluate(weights, genotype, images, layers, imagenet=False):
    """Logits by running statistics, and the multiply-adds for one image."""
    with paddle.base.dygraph.guard():
        run = Pass(tensors(weights, trainable=False), training=False)
        logits, _ = run.network(paddle.to_tensor(np.asarray(images, 'float64')), genotype, layers, imagenet,
                                auxiliary=0.0, masks=None)
        return Evaluation(logits.numpy(), run.multiply_adds)


def edge(weights, kind, x, direction, stride, training):
    """One operation, its weights named 'edge.…', and the gradients of the sum of output * direction."""
    with paddle.base.dygraph.guard():
        w = tensors(weights, trainable=True)
        x = paddle.to_tensor(x, stop_gradient=False)
        run = Pass(w, training)
        output = run.operation(kind, x, 'edge', stride)
        (output * paddle.to_tensor(direction)).sum().backward()
        return Edge(output.numpy(), x.grad.numpy(), gradients_of(w), run.statistics)
