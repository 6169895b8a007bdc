"""Runs a script in this process and records state, result and bytes sent of each step.

    python tests/recorded.py FILE SCRIPT FLAGS...         # writes FILE.<rank>.npz, {epoch/step/vector: array}
"""
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import engine  # noqa: F401  before paddle
import paddle

import utils
from engine import distributed, trainer

VECTORS = ('theta', 'velocity', 'statistics', 'alphas', 'adam_mean', 'adam_variance', 'gradient', 'd_alpha')


def main():
    path, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    run_epochs, all_reduce, states, sent = trainer.run_epochs, paddle.distributed.all_reduce, {}, []

    def counting_all_reduce(tensor):
        sent.append(tensor.numpy().nbytes)
        all_reduce(tensor)

    def recording_run_epochs(task, run, args):
        train_step, store = task.train_step, task.store

        def recording_step(batch, epoch, step):
            sent.clear()
            result = train_step(batch, epoch, step)
            vectors = {name: store.get(name) for name in VECTORS if store.scope.find_var(name)}
            for name, array in dict(vectors, sent=sent, result=result).items():       # result: of this rank's shard
                states[f'{epoch}/{step}/{name}'] = np.array(array)
            return result
        task.train_step = recording_step
        run_epochs(task, run, args)
        np.savez(f'{path}.{distributed.rank}.npz', **states)

    trainer.run_epochs, paddle.distributed.all_reduce = recording_run_epochs, counting_all_reduce
    importlib.import_module(script.removesuffix('.py')).main()


if __name__ == '__main__':
    utils.run(main)
