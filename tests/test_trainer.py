"""The epoch loop with a task without programs (checkpoints, log lines, signals), evaluation and prefetching."""
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest

import utils
from engine import trainer
from engine.checkpoint import Run
from runs import ROOT, assert_equal_runs, checkpoint_names, history
from tiny_runs import Crash, FakeTask, fake_run


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The folder of a fake run of two epochs of five steps."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert fake_run(folder) == 10
    return folder


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('crash_after, saved', enumerate([0, 0, 2, 2, 4, 5, 5, 7, 7, 9]))       # save_freq is 2
def test_resumed_after_a_crash_equals_uninterrupted(tmp_path, uninterrupted, capsys, crash_after, saved, workers):
    with pytest.raises(Crash):
        fake_run(tmp_path, crash_after=crash_after)
    capsys.readouterr()
    assert fake_run(tmp_path, resume=True, num_workers=workers) == 10 - saved
    output, bar = capsys.readouterr()
    assert 'resumed from' in output and f'step {saved % 5}/5' in bar and ('step 0/5' in bar) == (saved <= 5)
    assert fake_run(tmp_path, resume=True) == 0 and 'all 2 epochs were done already' in capsys.readouterr().out
    assert_equal_runs(tmp_path, uninterrupted)


def test_log_lines_history_and_checkpoints(tmp_path, capsys):
    class RecordingTask(FakeTask):
        def train_step(self, batch, epoch, step):
            losses.append(super().train_step(batch, epoch, step)[0])
            return losses[-1], 0.5, 1.0, 2

    losses = []
    with mock.patch.object(Run, 'save', autospec=True, side_effect=Run.save) as save:
        fake_run(tmp_path, task=RecordingTask, report_freq=3, save_freq=4)
    assert [call.args[2:4] for call in save.mock_calls] == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]
    assert checkpoint_names(tmp_path) == ['checkpoint-0001-000004.npz', 'checkpoint-0002-000000.npz']
    output, bar = capsys.readouterr()
    lines = re.findall(r'^epoch (\d) step (\d)/5: loss (\d\.\d{4}), top-1 50\.00 %, top-5 100\.00 %, lr (0\.\d+)$',
                       output, re.M)
    assert [(epoch, step, lr) for epoch, step, _, lr in lines] == [
        ('1', '3', '0.5'), ('1', '5', '0.5'), ('2', '3', '0.25'), ('2', '5', '0.25')]
    assert re.search(r'epoch 2: \d+\.\d % of the training time was spent waiting for input, peak memory \d+\.\d\d GB',
                     output)
    assert 'epoch 1/2' in bar and 'step 0/5' in bar and 'images/s' in bar
    assert re.search(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 2 step 5/5: ', (tmp_path / 'log.txt').read_text(), re.M)
    first, last = history(tmp_path)
    assert set(last) == {'epoch', 'lr', 'train_loss', 'train_top1', 'train_top5', 'largest', 'seconds'}
    assert (first['epoch'], first['lr'], last['epoch'], last['lr'], last['train_top1']) == (1, 0.5, 2, 0.25, 0.5)
    assert [first['train_loss'], last['train_loss']] == pytest.approx([np.mean(losses[:5]), np.mean(losses[5:])])
    assert [line[2] for line in lines] == [f'{np.mean(part):.4f}' for part in (losses[:3], losses[:5], losses[5:8],
                                                                                losses[5:])]


def test_a_stop_reason_ends_a_run_and_is_logged_again_at_a_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FakeTask, 'stop_reason', lambda task, record: 'too large' if record['epoch'] >= 2 else None,
                        raising=False)
    for resume, steps in ((False, 10), (True, 0)):
        assert fake_run(tmp_path, resume, epochs=4) == steps
        output = capsys.readouterr().out
        assert output.endswith('\ntoo large\n') and 'done already' not in output
        assert checkpoint_names(tmp_path)[-1] == 'checkpoint-0002-000000.npz' and len(history(tmp_path)) == 2
    monkeypatch.undo()
    assert fake_run(tmp_path, resume=True, epochs=4) == 10


@pytest.mark.parametrize('number, epoch, step, name, line', [
    (signal.SIGTERM, 1, 2, '0001-000003', 'stopped after step 3 of epoch 2'),
    (signal.SIGINT, 0, 0, '0000-000001', 'stopped after step 1 of epoch 1'),
    (signal.SIGTERM, 0, 4, '0000-000005', 'stopped after step 5 of epoch 1'),               # before the validation
    (signal.SIGTERM, 0, None, '0001-000000', 'stopped after epoch 1'),                      # during the validation
    (signal.SIGTERM, 1, None, '0002-000000', None)])                                        # the run has ended
def test_a_signal_stops_the_run_with_a_checkpoint(tmp_path, uninterrupted, capsys, number, epoch, step, name, line):
    class SignalledTask(FakeTask):
        def train_step(self, batch, *position):
            if position == (epoch, step):
                os.kill(os.getpid(), number)
                assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            return super().train_step(batch, *position)

        def finish_epoch(self, ended):
            if (ended, None) == (epoch, step):
                os.kill(os.getpid(), number)
            return super().finish_epoch(ended)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=f'^{128 + number}$') if line else contextlib.nullcontext():
        fake_run(tmp_path, task=SignalledTask)
    assert (f'{line}; --resume continues from here' in capsys.readouterr().out) == (line is not None)
    assert checkpoint_names(tmp_path)[-1] == f'checkpoint-{name}.npz'
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    fake_run(tmp_path, resume=True)
    assert_equal_runs(tmp_path, uninterrupted)


@pytest.mark.parametrize('loss, theta, message', [
    (np.nan, 1, r'the loss is nan at step 4 of epoch 1'), (-np.inf, 1, r'the loss is -inf at step 4 of epoch 1'),
    (0.5, np.inf, r'theta: not all numbers are finite after step 4 of epoch 1')])
def test_numbers_that_are_not_finite_end_the_run_and_reach_no_checkpoint(tmp_path, loss, theta, message):
    class DivergingTask(FakeTask):
        def train_step(self, batch, epoch, step):
            if step < 3:
                return super().train_step(batch, epoch, step)
            self.store.set('theta', np.full(3, theta))
            return loss, 0.5, 1.0, 2

    with pytest.raises(utils.UserError, match=message + r', learning rate 0\.5; the last good checkpoint is '
                                                        r'.*checkpoint-0000-000002\.npz'):
        fake_run(tmp_path, task=DivergingTask)
    assert checkpoint_names(tmp_path)[-1] == 'checkpoint-0000-000002.npz' and history(tmp_path) == []


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluate_counts_every_image_once(workers):
    class Batches(list):                                    # of numbers of images; the last shard may be empty
        def batch(self, epoch, step):
            return np.full((self[step], 3), step), np.full((self[step], 1), step)

    class Network:
        def evaluate(self, images, labels):
            assert len(images) == len(labels) > 0
            return 1.0 + labels[0, 0], np.float32(2 / 3) if len(labels) == 3 else 0.0, 1.0

    meter = trainer.evaluate(Network(), Batches([3, 3, 1, 0]), Namespace(num_workers=workers, batch_size=3))
    assert meter.images == 7
    assert meter.means('test') == {'test_loss': (3 + 6 + 3) / 7, 'test_top1': 4 / 7, 'test_top5': 1}   # exact counts


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_prefetch_keeps_the_order_and_raises_at_the_right_step(workers):
    def work(step):
        time.sleep(0.002 * (step % 3))
        if step == 7:
            raise ValueError('seven')
        return step * step
    results = trainer.prefetch(work, range(20), workers)
    assert [next(results) for _ in range(7)] == [n * n for n in range(7)]
    with pytest.raises(ValueError, match='seven'):
        next(results)


@pytest.mark.parametrize('depth, most', [(None, 5), (1, 2), (8, 9)])
def test_prefetch_works_ahead_within_its_depth(depth, most):
    started = []
    results = trainer.prefetch(lambda step: started.append(step) or step, range(1000), 2, depth)
    for taken in range(1, 4):
        assert next(results) == taken - 1
        limit = time.time() + 10
        while len(started) < most + taken - 1 and time.time() < limit:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(started) == most + taken - 1
    results.close()
    assert len(started) <= most + 2 and not [thread for thread in threading.enumerate() if 'ThreadPool' in thread.name]


def test_closing_prefetch_waits_only_for_the_calls_in_progress():
    started = []

    def work(step):
        started.append(step)
        time.sleep(0.1)
    results = trainer.prefetch(work, range(100), 2, depth=20)
    next(results)
    began = time.time()
    results.close()
    assert time.time() - began < 1 and len(started) <= 5


def test_a_program_that_leaves_prefetch_open_ends():
    code = ("import itertools, time; from engine import trainer; results = trainer.prefetch(lambda n: "
            "time.sleep(0.01) or n, itertools.count(), 3); print(next(results), next(results))")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=60, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.split() == [b'0', b'1']
