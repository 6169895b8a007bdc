"""Runs a step of the architect, of both orders, in float64 on two ranks, each with half of the batches.

    python tests/averaged.py FILE         # writes FILE.<rank>.npz, {order: d_alpha, 'alphas <order>': alpha}
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import engine  # noqa: F401  before paddle
import paddle

from architect import Architect
from engine import distributed
from engine.optimizers import MomentumSGD
from model_search import Supernet

LR, MOMENTUM, WEIGHT_DECAY = 0.3, 0.9, 3e-4
IMAGES = 4                                 # per batch, over both ranks


def make_supernet():
    """Returns a small supernet whose mixing weights are far from equal."""
    supernet = Supernet(channels=2, classes=5, layers=3, dtype='float64', image_size=8)
    supernet.store.set('alphas', np.random.default_rng(1).normal(size=supernet.store.get('alphas').shape))
    return supernet


def velocity(supernet):
    return np.random.default_rng(2).normal(0, 0.1, supernet.size)


def batches(shard):
    """Returns (images, labels) of a train and of a validation batch; shard: 0 or 1."""
    rng, half = np.random.default_rng(3), slice(shard * IMAGES // 2, (shard + 1) * IMAGES // 2)
    return [(rng.normal(size=(IMAGES, 3, 8, 8))[half], rng.integers(0, 5, (IMAGES, 1))[half]) for _ in range(2)]


def main():
    distributed.connect(paddle.CPUPlace())
    results, supernet = {}, make_supernet()
    alphas = supernet.store.get('alphas')
    for order in (2, 1):
        supernet.store.set('alphas', alphas)
        optimizer = MomentumSGD(supernet.store, MOMENTUM, WEIGHT_DECAY, 5.0)
        architect = Architect(supernet, optimizer, unrolled=order == 2)
        supernet.store.set('velocity', velocity(supernet))
        architect.step(*batches(distributed.rank), lr=LR)
        results[f'{order}'] = np.concatenate([array.reshape(-1) for array in architect.alpha_gradients().values()])
        results[f'alphas {order}'] = supernet.store.get('alphas')
    np.savez(f'{sys.argv[1]}.{distributed.rank}.npz', **results)


if __name__ == '__main__':
    main()
