"""The supernet as a static program, edge by edge and operation by operation: the benchmark's peer for the start.

It computes the same function as model_search.Supernet; the benchmark compares their losses. Every weight is a parameter
of its own, every edge has its eight operations, and their results are weighted and summed. The program has one forward
and one backward pass. A second-order search built this way would need several such programs.
"""
from __future__ import annotations

import functools
import operator

import engine  # noqa: F401  before paddle

import numpy as np
import paddle
import paddle.nn.functional as F

from engine.parameters import FlatParameters
from genotypes import EDGES, FIRST_EDGE, NODES, PRIMITIVES
from operations import (BatchNorm, DilConv, FactorizedReduce, ReLUConvBN, SepConv, States, avg_pool, batch_norm, conv,
                        linear, max_pool)


class EdgeByEdge:
    """The program on the CPU, for images of 32 x 32; channels, classes, layers: those of a Supernet."""

    def __init__(self, channels: int, classes: int, layers: int):
        self.layout, self.cells = FlatParameters(), []
        c_prev_prev = c_prev = 3 * channels
        self.stem = self.layout.declare(['stem.0.weight'], [c_prev, 3, 3, 3])
        self.stem_norm = BatchNorm(self.layout, ['stem.1'], c_prev, affine=True)
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            channels *= 1 + reduction
            first = FactorizedReduce if reduction_prev else ReLUConvBN
            preprocess = [kind(self.layout, [f'cells.{i}.preprocess{n}'], c_in, channels, affine=False)
                          for n, (kind, c_in) in enumerate(((first, c_prev_prev), (ReLUConvBN, c_prev)))]
            edges = [self._operations(f'cells.{i}._ops.{FIRST_EDGE[node] + state}', channels,
                                      2 if reduction and state < 2 else 1)
                     for node in range(NODES) for state in range(2 + node)]
            self.cells.append((preprocess, edges, reduction))
            c_prev_prev, c_prev, reduction_prev = c_prev, NODES * channels, reduction
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes])
        self.program = paddle.static.Program()
        with paddle.static.program_guard(self.program, paddle.static.Program()):
            self.fetches = self._build()
        self.operators = len(self.program.global_block().ops)
        self._executor, self._scope = paddle.static.Executor(paddle.CPUPlace()), paddle.static.Scope()

    def _operations(self, prefix: str, channels: int, stride: int) -> list:
        """Returns the operations of one edge as functions of x, in the order of PRIMITIVES without none."""
        def convolution(kind, k, kernel):
            operation = kind(self.layout, [f'{prefix}._ops.{k}'], channels, kernel, stride, affine=False)
            return lambda x: operation(States(x))
        skip = (lambda x: x) if stride == 1 else FactorizedReduce(self.layout, [f'{prefix}._ops.3'], channels, channels,
                                                                  affine=False)
        return [lambda x: batch_norm(max_pool(x, stride)), lambda x: batch_norm(avg_pool(x, stride)), skip,
                convolution(SepConv, 4, 3), convolution(SepConv, 5, 5), convolution(DilConv, 6, 3),
                convolution(DilConv, 7, 5)]

    def _build(self) -> list:
        """Builds the program; returns [loss, gradient of every parameter]."""
        images = paddle.static.data('images', [None, 3, 32, 32], 'float32')
        labels = paddle.static.data('labels', [None, 1], 'int64')
        self.layout.create_parameters()
        alphas = [paddle.static.create_parameter([EDGES, len(PRIMITIVES)], 'float32', name=name)
                  for name in ('alphas_normal', 'alphas_reduce')]
        s0 = s1 = self.stem_norm(conv(images, self.stem, padding=1))
        for (preprocess0, preprocess1), edges, reduction in self.cells:
            weights = F.softmax(alphas[reduction], axis=-1)
            states = [preprocess0(s0), preprocess1(s1)]
            for first in FIRST_EDGE:
                terms = [weights[first + j, k] * operation(state) for j, state in enumerate(states)
                         for k, operation in enumerate(edges[first + j], 1)]
                states.append(functools.reduce(operator.add, terms))
            s0, s1 = s1, paddle.concat(states[-NODES:], axis=1)
        logits = linear(paddle.mean(s1, axis=[2, 3]), self.classifier, self.classifier_bias)
        loss = F.cross_entropy(logits, labels)
        parameters = [group.tensor for group in self.layout.groups] + alphas
        return [loss, *paddle.static.gradients([loss], parameters)]

    def run(self, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
        """Returns the loss of a batch with weights and alphas {name: array}; computes all gradients too."""
        for name, array in weights.items():
            self._scope.var(name).get_tensor().set(np.ascontiguousarray(array, 'float32'), paddle.CPUPlace())
        with paddle.static.scope_guard(self._scope):
            return float(self._executor.run(self.program, feed={'images': images, 'labels': labels.reshape(-1, 1)},
                                            fetch_list=self.fetches)[0])
