"""Kills searches and trainings with SIGKILL at random moments, resumes each, and compares the end to the bit.

    python scripts/kill_and_resume.py                              # 20 searches and 20 trainings, each killed once
    python scripts/kill_and_resume.py --number 3 --seed 7 --scripts train.py

Each run is a small one on part of fashion_mnist_sample, with a checkpoint after every step. Three in ten are killed
while a checkpoint is being written (its `.part` is there), one while another file is, one before there is a
checkpoint (such a run starts again without --resume), the others anywhere. What an uninterrupted run leaves behind is
compared with what the resumed one does: the last two checkpoints, the history without the seconds, genotype.json or
the weights, and the names of all files. Exit code 1 when anything differs.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils

import numpy as np

import make_sample
import reader
from engine import checkpoint
from utils import UserError

SCRIPTS = ('train_search.py', 'train.py')
EPOCHS, STEPS = 3, 5                       # of the small run; of an epoch
BATCH_SIZE = {'train_search.py': 4, 'train.py': 8}             # the search trains weights with half of the images
IMAGES = BATCH_SIZE['train.py'] * STEPS // 10                  # of each class

Moment = namedtuple('Moment', 'kind target delay')
Moment.__doc__ = """kind: 'start', 'checkpoint' or 'file' (while one is written) or 'anywhere'; target: how many steps
are in a checkpoint before the kill; delay: seconds from then on, or from the start of the process."""


def draw_moments(number, seed, step_seconds, start_seconds):
    """The moments of `number` kills, of all kinds in a fixed order."""
    rng = np.random.default_rng(seed)
    moments = []
    for k in range(number):
        kind = {1: 'checkpoint', 3: 'file', 5: 'checkpoint', 7: 'start', 9: 'checkpoint'}.get(k % 10, 'anywhere')
        moments.append(Moment(kind, int(rng.integers(EPOCHS * STEPS)),
                              rng.uniform(0, start_seconds if kind == 'start' else step_seconds)))
    return moments


def command(script, data, folder, *flags):
    return [sys.executable, os.path.join(ROOT, script), '--dataset', 'fashion_mnist_sample', '--data', data,
            '--init_channels', '2', '--layers', '3', '--batch_size', str(BATCH_SIZE[script]), '--epochs', str(EPOCHS),
            '--save_freq', '1', '--report_freq', '1', '--use_gpu', 'False', '--model_save_dir', folder, *flags]


def start(script, data, folder, *flags):
    return subprocess.Popen(command(script, data, folder, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(process):
    """Waits for a run that has to succeed; UserError with what it said otherwise."""
    said = process.communicate()[1]
    if process.returncode:
        raise UserError(f"{os.path.basename(process.args[1])} ended with {process.returncode}: "
                        f"{said.strip().splitlines()[-1] if said.strip() else ''}")


def names(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def progress(folder):
    """-> (steps in the last checkpoint, or None without one; the files that are being written)."""
    found = names(folder)
    checkpoints = [name for name in found if name.startswith('checkpoint-') and name.endswith('.npz')]
    epoch, step = map(int, checkpoints[-1][:-len('.npz')].split('-')[1:]) if checkpoints else (0, None)
    return None if step is None else epoch * STEPS + step, [name for name in found if name.endswith('.part')]


def kill(process, folder, moment):
    """Sends SIGKILL at the moment; -> whether the run was still going."""
    if moment.kind != 'start':
        while process.poll() is None:
            done, writing = progress(folder)
            if done is not None and done >= moment.target and (moment.kind == 'anywhere' or any(
                    name.startswith('checkpoint-') == (moment.kind == 'checkpoint') for name in writing)):
                break
            time.sleep(0.002 if moment.kind == 'anywhere' else 0)
    if moment.kind in ('start', 'anywhere'):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.delay)
    process.kill()
    return process.wait() < 0


def end_of(folder):
    """{what: value} that a finished run leaves behind, without what time alone decides."""
    found = names(folder)
    end = {'names of the files': found}
    for name in found:
        path = os.path.join(folder, name)
        if name.endswith('.npz'):
            about, arrays = checkpoint.read_arrays(path)
            if name.startswith('checkpoint-'):
                about['meter'].pop('seconds')
            end[name] = about, {key: (array.dtype.str, array.shape, array.tobytes()) for key, array in arrays.items()}
        elif name == 'genotype.json':
            with open(path, encoding='utf-8') as file:
                end[name] = file.read()
        elif name == 'history.jsonl':
            with open(path, encoding='utf-8') as file:
                end[name] = [{key: value for key, value in json.loads(line).items() if key != 'seconds'}
                             for line in file]
    return end


def differences(one, other):
    """The names of what differs in two `end_of`."""
    return [name for name in sorted(set(one) | set(other)) if one.get(name) != other.get(name)]


def kill_and_resume(script, data, folder, moment, expected):
    """-> (when it was killed, as a text; whether a file was being written then; what differs in the end)."""
    for attempt in range(5):                   # on a busy machine a run may be over before its moment
        if attempt:
            moment = moment._replace(delay=moment.delay / 4, target=moment.target // 2)
        shutil.rmtree(folder, ignore_errors=True)
        process = start(script, data, folder)
        if kill(process, folder, moment):
            break
        finish(process)
    else:
        raise UserError(f"{script} was over before it could be killed, five times")
    done, writing = progress(folder)
    if done is None:
        when = 'before the first checkpoint'
    else:
        when = f'epoch {done // STEPS + 1}, {done % STEPS} of {STEPS} steps saved'
    if writing:
        when += f', writing {writing[0][:-len(".part")]}'
    finish(start(script, data, folder, *([] if done is None else ['--resume'])))
    differing = differences(end_of(folder), expected)
    shutil.rmtree(folder)
    return when, bool(writing), differing


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--number', type=utils.number(int, 1), default=20, help='kills of each script (%(default)s)')
    add('--seed', type=utils.number(int, 0), default=0, help='of the moments (%(default)s)')
    add('--scripts', nargs='+', choices=SCRIPTS, default=SCRIPTS, help='(both)')
    add('--jobs', type=utils.number(int, 1), default=1, help='runs at a time (%(default)s)')
    args = parser.parse_args()
    began, failed, total, in_writing = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.jobs) as pool:
        data = os.path.join(root, 'data')
        make_sample.make(reader.default_folder('fashion_mnist_sample'), data, train=IMAGES, test=2)
        print(f"{'script':<16} {'kill':>4}  {'killed':<72} end")
        for script in args.scripts:
            whole, started = os.path.join(root, 'whole'), time.time()
            process = start(script, data, whole)
            while process.poll() is None and progress(whole)[0] is None:
                time.sleep(0.01)
            ready = time.time()
            finish(process)
            moments = draw_moments(args.number, args.seed, (time.time() - ready) / (EPOCHS * STEPS), ready - started)
            expected = end_of(whole)
            shutil.rmtree(whole)
            results = pool.map(lambda each: kill_and_resume(
                script, data, os.path.join(root, f'run{each[0]}'), each[1], expected), enumerate(moments))
            for k, (when, writing, differing) in enumerate(results, 1):
                print(f"{script:<16} {k:>4}  {when:<72} {'differs: ' + ', '.join(differing) if differing else 'equal'}",
                      flush=True)
                total, failed, in_writing = total + 1, failed + bool(differing), in_writing + writing
    print(f"{total} kills, {in_writing} of them while a file was being written: {total - failed} equal to the "
          f"uninterrupted run, {failed} different; {time.time() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    utils.run(main)
