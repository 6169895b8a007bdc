"""The supernet as a static program built edge by edge and operation by operation: the benchmark's peer for start and launches.

It is the same function as model_search.Supernet (the benchmark compares their losses), written the obvious way: every
weight is a parameter of its own, every edge of every cell has its eight operations, their results are weighted and
summed. One forward and one backward pass; a second order built this way needs several such programs.
"""
import numpy as np
import paddle
import paddle.nn.functional as F

from genotypes import EDGES, NODES, PRIMITIVES
from operations import (BatchNorm, DilConv, FactorizedReduce, ReLUConvBN, SepConv, States, avg_pool, batch_norm, conv,
                        linear, max_pool)
from engine.parameters import FlatParameters


class EdgeByEdge:
    """channels, classes, layers: as of the Supernet; images of 32 x 32 on the CPU."""

    def __init__(self, channels, classes, layers):
        self.layout, self.cells = FlatParameters(), []
        c_prev_prev = c_prev = 3 * channels
        self.stem = self.layout.declare(['stem.0.weight'], [c_prev, 3, 3, 3])
        self.stem_norm = BatchNorm(self.layout, ['stem.1'], c_prev, affine=True)
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            channels *= 1 + reduction
            first = FactorizedReduce if reduction_prev else ReLUConvBN
            preprocess = [kind(self.layout, [f'cells.{i}.preprocess{n}'], c, channels, affine=False)
                          for n, (kind, c) in enumerate(((first, c_prev_prev), (ReLUConvBN, c_prev)))]
            edges = [[self._operations(f'cells.{i}._ops.{node * (node + 3) // 2 + state}', channels,
                                       2 if reduction and state < 2 else 1) for state in range(2 + node)]
                     for node in range(NODES)]
            self.cells.append((preprocess, edges, reduction))
            c_prev_prev, c_prev, reduction_prev = c_prev, NODES * channels, reduction
        self.classifier = self.layout.declare(['classifier.weight'], [classes, c_prev])
        self.classifier_bias = self.layout.declare(['classifier.bias'], [classes])
        self.program = paddle.static.Program()
        with paddle.static.program_guard(self.program, paddle.static.Program()):
            self.fetches = self._build()
        self.operators = len(self.program.global_block().ops)
        self._executor, self._scope = paddle.static.Executor(paddle.CPUPlace()), paddle.static.Scope()

    def _operations(self, prefix, channels, stride):
        """The operations of one edge, in the order of PRIMITIVES; None for none."""
        def convolution(kind, k, kernel):
            op = kind(self.layout, [f'{prefix}._ops.{k}'], channels, kernel, stride, affine=False)
            return lambda x: op(States(x))
        skip = FactorizedReduce(self.layout, [f'{prefix}._ops.3'], channels, channels, False) if stride == 2 else lambda x: x
        return [None, lambda x: batch_norm(max_pool(x, stride)), lambda x: batch_norm(avg_pool(x, stride)), skip,
                convolution(SepConv, 4, 3), convolution(SepConv, 5, 5), convolution(DilConv, 6, 3), convolution(DilConv, 7, 5)]

    def _build(self):
        images = paddle.static.data('images', [None, 3, 32, 32], 'float32')
        labels = paddle.static.data('labels', [None, 1], 'int64')
        self.layout.create_parameters()
        alphas = [paddle.static.create_parameter([EDGES, len(PRIMITIVES)], 'float32', name=name) for name in
                  ('alphas_normal', 'alphas_reduce')]
        s0 = s1 = self.stem_norm(conv(images, self.stem, padding=1))
        for (first, second), edges, reduction in self.cells:
            weights = F.softmax(alphas[reduction], axis=-1)
            states, edge = [first(s0), second(s1)], 0
            for node in edges:
                total = None
                for operations, state in zip(node, states):
                    for k, operation in enumerate(operations):
                        if operation:
                            term = weights[edge, k] * operation(state)
                            total = term if total is None else total + term
                    edge += 1
                states.append(total)
            s0, s1 = s1, paddle.concat(states[-NODES:], axis=1)
        logits = linear(paddle.mean(s1, axis=[2, 3]), self.classifier, self.classifier_bias)
        loss = F.cross_entropy(logits, labels)
        parameters = [block.tensor for block in self.layout.groups] + alphas
        return [loss, *paddle.static.gradients([loss], parameters)]

    def run(self, weights, images, labels):
        """The loss of a batch with weights and alphas {name: array}; the gradients are computed too."""
        for name, array in weights.items():
            self._scope.var(name).get_tensor().set(np.ascontiguousarray(array, 'float32'), paddle.CPUPlace())
        with paddle.static.scope_guard(self._scope):
            return float(self._executor.run(self.program, feed={'images': images, 'labels': labels.reshape(-1, 1)},
                                            fetch_list=self.fetches)[0])
