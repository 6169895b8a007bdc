"""The networks and the search of DARTS in PyTorch, edge by edge and operation by operation.

A second implementation, for the tests that compare results and for the benchmark. The names in the state dicts are
those of the authors' code. Needs torch (pip install torch).
"""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from genotypes import DARTS_SPACE as SPACE


# Operations: [N, C, H, W] -> [N, C, H / stride, W / stride]

def separable(channels, kernel, stride, dilation, affine, inplace=False):
    """Returns the modules ReLU, depthwise k x k, pointwise, BN; inplace: of ReLU, when nothing else reads its input."""
    return [nn.ReLU(inplace=inplace), nn.Conv2d(channels, channels, kernel, stride, dilation * (kernel // 2), dilation,
                                                groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)]


class Chain(nn.Module):
    """Modules in a sequence, whose weights have names with `op`."""

    def __init__(self, *modules):
        super().__init__()
        self.op = nn.Sequential(*modules)

    def forward(self, x):
        return self.op(x)


def relu_conv_bn(c_in, c_out, affine):
    """Returns ReLU, convolution 1 x 1, BN: [N, c_in, H, W] -> [N, c_out, H, W]."""
    return Chain(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


class FactorizedReduce(nn.Module):
    """ReLU, two convolutions 1 x 1 with stride 2, the second offset by a pixel, BN: -> [N, c_out, H / 2, W / 2]."""

    def __init__(self, c_in, c_out, affine):
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False) for _ in range(2))
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def conv_bn(c_in, c_out, stride):
    """Returns the modules convolution 3 x 3 and BN of a stem."""
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)


def operation(name, channels, stride, affine):
    """Returns the module of an operation of the search space (other than none) or of the published genotypes."""
    if name == 'max_pool_3x3':
        return nn.MaxPool2d(3, stride, 1)
    if name == 'avg_pool_3x3':
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == 'skip_connect':
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if name == 'conv_7x1_1x7':
        return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
                             nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
                             nn.BatchNorm2d(channels, affine=affine))
    kernel = int(name[-1])
    if name.startswith('sep_conv'):
        return Chain(*separable(channels, kernel, stride, 1, affine),
                     *separable(channels, kernel, 1, 1, affine, inplace=True))
    return Chain(*separable(channels, kernel, stride, 2, affine))


def arrays_of(state_dict):
    """Returns {name: array} of the weights and running statistics in a state dict."""
    return {name: tensor.detach().numpy() for name, tensor in state_dict.items()
            if not name.endswith('.num_batches_tracked')}


def reduction_cells(layers):
    """Returns the indices of the cells that halve the image and double the channels."""
    return layers // 3, 2 * layers // 3


def add(terms):
    """Returns the sum of a list of tensors, without the first addition of sum(), to 0."""
    return sum(terms[1:], terms[0])


class MixedOp(nn.Module):
    """The weighted sum of all operations on an edge."""

    def __init__(self, channels, stride):
        super().__init__()
        # none contributes zero to the sum; its placeholder keeps the numbers in the names of the other operations.
        self._ops = nn.ModuleList([nn.Identity()])
        for name in SPACE.primitives[1:]:
            op = operation(name, channels, stride, affine=False)
            if 'pool' in name:
                op = nn.Sequential(op, nn.BatchNorm2d(channels, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        """weights: the softmax of alpha, [primitives]."""
        return add([weight * op(x) for weight, op in list(zip(weights.unbind(), self._ops))[1:]])


class MixedCell(nn.Module):
    """A cell of the supernet: (s0, s1), the outputs of the two cells before, -> [N, 4 * C, H', W']."""

    def __init__(self, c_prev_prev, c_prev, channels, reduction, reduction_prev):
        super().__init__()
        self.reduction = reduction
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(c_prev_prev, channels, affine=False)
        self.preprocess1 = relu_conv_bn(c_prev, channels, affine=False)
        self._ops = nn.ModuleList(MixedOp(channels, 2 if reduction and state < 2 else 1)
                                  for node in range(SPACE.nodes) for state in range(2 + node))

    def forward(self, s0, s1, weights):
        """weights: the softmax of alpha of all edges, [edges, primitives]."""
        weights = weights.unbind()
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for first in SPACE.first_edges:
            states.append(add([self._ops[first + j](x, weights[first + j]) for j, x in enumerate(states)]))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, classes]; channels: C of the first cell; layers: number of cells, at least 3.

    alphas_normal and alphas_reduce [edges, primitives] require gradients, but are neither in parameters() nor in
    state_dict(). They change device and type with the network.
    """

    def __init__(self, channels, classes, layers):
        super().__init__()
        c_prev_prev = c_prev = 3 * channels
        self.stem = nn.Sequential(*conv_bn(3, c_prev, 1))
        self.cells, reduction_prev = nn.ModuleList(), False
        for i in range(layers):
            reduction = i in reduction_cells(layers)
            if reduction:
                channels *= 2
            self.cells.append(MixedCell(c_prev_prev, c_prev, channels, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, SPACE.nodes * channels, reduction
        self.classifier = nn.Linear(c_prev, classes)
        self.alphas_normal, self.alphas_reduce = (
            (1e-3 * torch.randn(SPACE.edges, len(SPACE.primitives))).requires_grad_() for _ in range(2))

    def alphas(self):
        return [self.alphas_normal, self.alphas_reduce]

    def _apply(self, fn, *args, **kwargs):
        # Called by to(), double() etc. Changes alpha in place, because its optimizer refers to these tensors.
        super()._apply(fn, *args, **kwargs)
        for alphas in self.alphas():
            alphas.data = fn(alphas.data)
        return self

    def forward(self, images):
        normal, reduce = F.softmax(self.alphas_normal, dim=-1), F.softmax(self.alphas_reduce, dim=-1)
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classifier(s1.mean(dim=(2, 3)))


class Architect:
    """Updates alpha of a supernet by Adam on the second-order gradient (arXiv 1806.09055, section 2.3).

    optimizer: the torch.optim.SGD that trains the weights; the virtual step takes its settings and momentum buffers.
    unrolled: False for the first-order gradient.
    """

    def __init__(self, network, optimizer, arch_learning_rate=3e-4, arch_weight_decay=1e-3, unrolled=True):
        self.network, self.optimizer, self.unrolled = network, optimizer, unrolled
        self.weights = list(network.parameters())
        self.adam = torch.optim.Adam(network.alphas(), arch_learning_rate, betas=(0.5, 0.999),
                                     weight_decay=arch_weight_decay)

    def step(self, train, valid):
        """Updates alpha once and leaves the weights unchanged; train, valid: (images [N, 3, H, W], labels [N])."""
        for alphas, gradient in zip(self.network.alphas(), self.gradient(train, valid)):
            alphas.grad = gradient
        self.adam.step()

    def gradient(self, train, valid):
        """Returns d_alpha, [normal, reduce], each [edges, primitives], without the weight decay of alpha."""
        alphas = self.network.alphas()
        if not self.unrolled:
            return list(self._gradients(valid, alphas))
        xi = self.optimizer.param_groups[0]['lr']
        saved = [weight.detach().clone() for weight in self.weights]
        self._virtual_step(self._gradients(train, self.weights))
        gradients = self._gradients(valid, alphas + self.weights)
        outer, u = gradients[:len(alphas)], gradients[len(alphas):]
        eps = 0.01 / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(u)))
        plus = self._alpha_gradients_at(saved, u, eps, train)
        minus = self._alpha_gradients_at(saved, u, -eps, train)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, saved)
        return [o - xi * (p - m) / (2 * eps) for o, p, m in zip(outer, plus, minus)]

    def _gradients(self, batch, inputs):
        images, labels = batch
        return torch.autograd.grad(F.cross_entropy(self.network(images), labels), inputs)

    @torch.no_grad()
    def _virtual_step(self, gradients):
        """Sets w <- w - xi (mu v + g + lambda w)."""
        settings = self.optimizer.param_groups[0]
        change = torch._foreach_add(list(gradients), self.weights, alpha=settings['weight_decay'])
        # The optimizer creates its momentum buffers, which start at zero, in its first step.
        buffers = [self.optimizer.state[weight].get('momentum_buffer') for weight in self.weights]
        if buffers[0] is not None:
            torch._foreach_add_(change, buffers, alpha=settings['momentum'])
        torch._foreach_add_(self.weights, change, alpha=-settings['lr'])

    def _alpha_gradients_at(self, weights, direction, length, batch):
        """Returns the gradients of alpha at weights + length * direction, to which it sets the weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, torch._foreach_add(weights, torch._foreach_mul(direction, length)))
        return self._gradients(batch, self.network.alphas())


def search_step(network, architect, optimizer, train, valid, grad_clip=5.0):
    """Updates alpha by Architect.step, then the weights; returns loss and logits of `train` with the new alpha."""
    architect.step(train, valid)
    images, labels = train
    logits = network(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward(inputs=architect.weights)
    nn.utils.clip_grad_norm_(architect.weights, grad_clip)
    optimizer.step()
    return loss.detach(), logits.detach()


def drop_path(x, prob):
    """Sets samples of x to zero with probability `prob` and scales the others to keep the expectation."""
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - prob).div_(1 - prob)


class Cell(nn.Module):
    """A cell of a genotype: (s0, s1), the outputs of the two cells before, -> [N, len(concat) * C, H', W']."""

    def __init__(self, genotype, c_prev_prev, c_prev, channels, reduction, reduction_prev):
        super().__init__()
        preprocess0 = FactorizedReduce if reduction_prev else relu_conv_bn
        self.preprocess0 = preprocess0(c_prev_prev, channels, affine=True)
        self.preprocess1 = relu_conv_bn(c_prev, channels, affine=True)
        edges, self.concat = ((genotype.reduce, genotype.reduce_concat) if reduction else
                              (genotype.normal, genotype.normal_concat))
        self._ops = nn.ModuleList(operation(name, channels, 2 if reduction and state < 2 else 1, affine=True)
                                  for name, state in edges)
        self.states = [state for _, state in edges]
        self.channels_out = len(self.concat) * channels

    def forward(self, s0, s1, drop_path_prob=0.0):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for n, (op, state) in enumerate(zip(self._ops, self.states)):
            x = op(states[state])
            if self.training and drop_path_prob > 0 and not isinstance(op, nn.Identity):
                x = drop_path(x, drop_path_prob)
            if n % 2 == 0:                  # the first of the two edges of a node
                states.append(x)
            else:
                states[-1] = states[-1] + x
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """An auxiliary classifier: [N, C, 8, 8] with stride 3 or [N, C, 7, 7] with stride 2 -> [N, classes]."""

    def __init__(self, channels, classes, stride, last_norm):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),                                   # not in place, because the next cell reads its input
            nn.AvgPool2d(5, stride, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if last_norm else []),
            nn.ReLU(inplace=True))
        self.classifier = nn.Linear(768, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Network(nn.Module):
    """Images [N, 3, H, W] -> logits [N, classes] and those of the auxiliary head (None without it, and in eval()).

    drop_path_prob: set by the training; without an effect in eval().
    """

    def __init__(self, genotype, channels, classes, layers, auxiliary=False):
        super().__init__()
        self.drop_path_prob = 0.0
        c_prev_prev, c_prev, reduction_prev = self._make_stem(channels)
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in reduction_cells(layers)
            if reduction:
                channels *= 2
            self.cells.append(Cell(genotype, c_prev_prev, c_prev, channels, reduction, reduction_prev))
            c_prev_prev, c_prev, reduction_prev = c_prev, self.cells[i].channels_out, reduction
        self.auxiliary_after = reduction_cells(layers)[1]
        self.auxiliary_head = AuxiliaryHead(self.cells[self.auxiliary_after].channels_out, classes,
                                            *self.AUXILIARY_HEAD) if auxiliary else None
        self.classifier = nn.Linear(c_prev, classes)

    def forward(self, images):
        (s0, s1), auxiliary_logits = self._stem(images), None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == self.auxiliary_after and self.auxiliary_head is not None and self.training:
                auxiliary_logits = self.auxiliary_head(s1)
        return self.classifier(s1.mean(dim=(2, 3))), auxiliary_logits


class NetworkCIFAR(Network):
    """The network for images of 32 x 32."""

    AUXILIARY_HEAD = (3, True)              # stride of its pool, whether it has the last BN

    def _make_stem(self, channels):
        """Returns the channels of s0 and s1, and whether the first cell has to reduce s0."""
        self.stem = nn.Sequential(*conv_bn(3, 3 * channels, 1))
        return 3 * channels, 3 * channels, False

    def _stem(self, images):
        x = self.stem(images)
        return x, x


class NetworkImageNet(Network):
    """The network for images of 224 x 224."""

    AUXILIARY_HEAD = (2, False)

    def _make_stem(self, channels):
        self.stem0 = nn.Sequential(*conv_bn(3, channels // 2, 2), nn.ReLU(inplace=True),
                                   *conv_bn(channels // 2, channels, 2))
        self.stem1 = nn.Sequential(nn.ReLU(), *conv_bn(channels, channels, 2))
        return channels, channels, True

    def _stem(self, images):
        s0 = self.stem0(images)
        return s0, self.stem1(s0)
