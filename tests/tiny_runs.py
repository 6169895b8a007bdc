"""Small runs in this process: of the search, and of a task that has no programs."""
from argparse import Namespace

import numpy as np
import paddle

import reader
import train_search
from engine import custom_ops, device, trainer
from engine.checkpoint import Run
from engine.programs import VariableStore


class Crash(Exception):
    """Stands for the end of the process in the middle of a run."""


def run_task(task, run, args, crash_after=None):
    """Runs a task to its end and returns the number of steps; raises Crash after `crash_after` steps."""
    train_step, done = task.train_step, []

    def counted_step(batch, epoch, step):
        if len(done) == crash_after:
            raise Crash
        done.append((epoch, step))
        return train_step(batch, epoch, step)

    task.train_step = counted_step
    trainer.run_epochs(task, run, args)
    return len(done)


class FakeTask:
    """A task of engine.trainer without programs: theta depends on all steps before, like weights in training."""

    steps = 5

    def __init__(self, run):
        self.store = VariableStore(paddle.CPUPlace())
        self.store.set('theta', np.ones(3), saved=True)
        self.store.host_state['largest'] = -1.0

    def batch(self, epoch, step):
        return np.random.default_rng([epoch, step]).random(3)

    def learning_rate(self, epoch):
        return 0.5 / (1 + epoch)

    def train_step(self, batch, epoch, step):
        theta = self.store.get('theta')
        self.store.set('theta', theta - self.learning_rate(epoch) * (theta - batch))
        return float(np.mean((theta - batch) ** 2)), 0.5, 1.0, 2

    def finish_epoch(self, epoch):
        self.store.host_state['largest'] = max(self.store.host_state['largest'], float(self.store.get('theta').max()))
        return {'largest': self.store.host_state['largest']}


def fake_run(folder, resume=False, crash_after=None, task=FakeTask, **changes):
    """Runs a FakeTask for two epochs of five steps; returns the number of steps that were taken."""
    args = Namespace(**{'model_save_dir': str(folder), 'resume': resume, 'visualdl': None, 'epochs': 2, 'batch_size': 2,
                        'num_workers': 0, 'report_freq': 2, 'save_freq': 2, **changes})
    run = Run(args)
    return run_task(task(run), run, args, crash_after)


def tiny_search(folder, resume=False, crash_after=None, **changes):
    """Runs a search of two epochs of three steps on 18 random images; returns the number of steps that were taken.

    It uses the compiled operators, which are much faster to prepare, where they are available.
    """
    args = train_search.parse_args([])
    vars(args).update({'model_save_dir': str(folder), 'resume': resume, 'epochs': 2, 'batch_size': 3, 'class_num': 10,
                       'init_channels': 2, 'layers': 3, 'save_freq': 2, **changes})
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (18, 3, 32, 32), 'uint8'), np.arange(18) % 10
    data = reader.Dataset('random', 10, tuple('0123456789'), images, labels, images, labels,
                          np.full(3, 0.5, 'float32'), np.full(3, 0.25, 'float32'))
    with custom_ops.disabled():                        # at the end they are switched back
        custom_ops.enable(args.custom_ops)
        run = Run(args)
        return run_task(train_search.Search(args, data, run, device.find_place(False)), run, args, crash_after)
