"""The supernet as a static program, edge by edge and operation by operation: the benchmark's peer for the start.

The program is that of tests/reference/supernet.py, the definition of the supernet, with one forward and one backward
pass. Every weight is a parameter. A second-order search built this way would need several such programs.
"""
from __future__ import annotations

from unittest import mock

import engine  # noqa: F401  before paddle
import numpy as np
import paddle
import paddle.nn.functional as F

import operations
from genotypes import DARTS_SPACE
from reference import supernet


def forward(channels: int, classes: int, layers: int) -> tuple:
    """Adds the supernet to the program under construction; returns the logits and {name: variable} of all parameters.

    The parameters are weights and alphas, the input `images` is [N, 3, 32, 32].
    """
    shapes = supernet.weight_shapes(channels, classes, layers)
    for name in ('alphas_normal', 'alphas_reduce'):
        shapes[name] = DARTS_SPACE.edges, len(DARTS_SPACE.primitives)
    images = paddle.static.data('images', [None, 3, 32, 32], 'float32')
    weights = {name: paddle.static.create_parameter(
        shape, 'float32', name=name, default_initializer=paddle.nn.initializer.Constant(0.0))
        for name, shape in shapes.items()}
    # Paddle's normalisation instead of the formula written out: no more operators than the peer needs.
    with mock.patch.object(supernet, 'batch_norm', operations.batch_norm):
        return supernet.forward(weights, weights, images, channels, layers), weights


class EdgeByEdge:
    """The program on the CPU, for images of 32 x 32; channels, classes, layers: those of a Supernet."""

    def __init__(self, channels: int, classes: int, layers: int):
        self.program = paddle.static.Program()
        with paddle.static.program_guard(self.program, paddle.static.Program()):
            labels = paddle.static.data('labels', [None, 1], 'int64')
            logits, weights = forward(channels, classes, layers)
            loss = F.cross_entropy(logits, labels)
            self.fetches = [loss, *paddle.static.gradients([loss], list(weights.values()))]
        self.operators = len(self.program.global_block().ops)
        self._executor, self._scope = paddle.static.Executor(paddle.CPUPlace()), paddle.static.Scope()

    def run(self, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
        """Returns the loss of a batch with weights and alphas {name: array}; computes the gradients too."""
        for name, array in weights.items():
            self._scope.var(name).get_tensor().set(np.ascontiguousarray(array, 'float32'), paddle.CPUPlace())
        with paddle.static.scope_guard(self._scope):
            return float(self._executor.run(self.program, feed={'images': images, 'labels': labels.reshape(-1, 1)},
                                            fetch_list=self.fetches)[0])
