"""Runs a script in this process and keeps the state after each of its steps, and how many bytes it sent.

    python tests/recorded.py FILE SCRIPT FLAGS...         # writes FILE.<rank>.npz, {epoch/step/vector: array}
"""
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils

import numpy as np
import paddle

from engine import distributed
from engine import trainer

VECTORS = ('theta', 'velocity', 'statistics', 'alphas', 'adam_mean', 'adam_variance', 'gradient', 'd_alpha')


def main():
    path, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    run_epochs, all_reduce, states, sent = trainer.run_epochs, paddle.distributed.all_reduce, {}, []

    def counted(tensor):
        sent.append(tensor.numpy().nbytes)
        all_reduce(tensor)

    def recorded(task, run, args):
        take_step = task.train_step
        store = (task.supernet if hasattr(task, 'supernet') else task.network).store

        def recorded_step(batch, epoch, step):
            sent.clear()
            result = take_step(batch, epoch, step)
            states[f'{epoch}/{step}/sent'] = np.array(sent)
            for name in VECTORS:
                if store.scope.find_var(name):
                    states[f'{epoch}/{step}/{name}'] = store.get(name)
            return result
        task.train_step = recorded_step
        run_epochs(task, run, args)
        np.savez(f'{path}.{distributed.rank}.npz', **states)

    trainer.run_epochs, paddle.distributed.all_reduce = recorded, counted
    importlib.import_module(script.removesuffix('.py')).main()


if __name__ == '__main__':
    utils.run(main)
