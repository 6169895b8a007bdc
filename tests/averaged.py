"""A step of the architect in float64 on two processes, each with half of the batches.

    python tests/averaged.py FILE         # writes FILE.<rank>.npz
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils  # noqa: F401

import numpy as np
import paddle

from engine import distributed
from architect import Architect
from model_search import Supernet
from engine.optimizers import MomentumSGD

LR, MOMENTUM, WEIGHT_DECAY = 0.3, 0.9, 3e-4


def supernet():
    """A small supernet with alpha far from equal."""
    net = Supernet(channels=2, classes=5, layers=3, dtype='float64', image_size=8)
    rng = np.random.default_rng(1)
    net.store.set('alphas', rng.normal(size=(2, 14, 8)))
    return net


def velocity(net):
    return np.random.default_rng(2).normal(0, 0.1, net.size)


def batches(part, parts):
    """(images, labels) of a train and of a validation batch: the part-th of so many parts."""
    rng = np.random.default_rng(3)
    whole = [(rng.normal(size=(8, 3, 8, 8)), rng.integers(0, 5, (8, 1))) for _ in range(2)]
    mine = slice(8 * part // parts, 8 * (part + 1) // parts)
    return [(images[mine], labels[mine]) for images, labels in whole]


def main():
    distributed.connect(paddle.CPUPlace())
    results, net = {}, supernet()
    alphas = net.store.get('alphas')
    for unrolled in (True, False):
        net.store.set('alphas', alphas)
        architect = Architect(net, MomentumSGD(net.store, MOMENTUM, WEIGHT_DECAY, 5.0), unrolled=unrolled)
        net.store.set('velocity', velocity(net))
        before = net.store.get('theta')
        architect.step(*batches(distributed.rank, distributed.world_size), lr=LR)
        assert np.array_equal(net.store.get('theta'), before)
        results[f'{unrolled}'] = np.stack(list(architect.alpha_gradients().values()))
        results[f'alphas {unrolled}'] = net.store.get('alphas')
    np.savez(f'{sys.argv[1]}.{distributed.rank}.npz', **results)


if __name__ == '__main__':
    main()
