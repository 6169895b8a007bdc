"""Kills searches and trainings with SIGKILL at random moments, resumes them, and compares the results bitwise.

    python scripts/dev/kill_and_resume.py                          # 20 searches and 20 trainings, each killed once
    python scripts/dev/kill_and_resume.py --number 3 --seed 7 --scripts train.py

A run is a small one on a part of fashion_mnist_sample, with a checkpoint after every step. Of ten runs three are killed
while a checkpoint is written (its `.part` exists), one while another file is written, one before the first checkpoint
(that run is started again without --resume), and five at any moment. The files of the resumed run are compared with
those of an uninterrupted run: the last two checkpoints, the history without its seconds, genotype.json or the weights,
and the names of all files. The exit code is 1 when a run differs.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import numpy as np

import make_sample
import reader
import utils
from engine import checkpoint
from utils import UserError

EPOCHS, STEPS = 3, 5                                           # of a run; of an epoch
BATCH_SIZE = {'train_search.py': 4, 'train.py': 8}             # a search trains the weights on half of the images
IMAGES = BATCH_SIZE['train.py'] * STEPS // 10                  # per class


class Moment(NamedTuple):
    """When to kill a run: `delay` seconds after a checkpoint of `target` steps, or after the start of the process."""
    kind: str          # 'start', 'anywhere', 'checkpoint' (while a checkpoint is written) or 'file' (another file)
    target: int
    delay: float


def draw_moments(number: int, seed: int, step_seconds: float, start_seconds: float) -> list[Moment]:
    """Returns random moments of all kinds, the kinds in a fixed order."""
    rng = np.random.default_rng(seed)
    special = ('checkpoint', 'file', 'checkpoint', 'start', 'checkpoint')
    kinds = [special[k // 2 % 5] if k % 2 else 'anywhere' for k in range(number)]
    longest = {'start': start_seconds, 'anywhere': step_seconds}
    return [Moment(kind, int(rng.integers(EPOCHS * STEPS)), rng.uniform(0, longest.get(kind, 0)))
            for kind in kinds]


def command(script: str, data: str, folder: str, *flags: str) -> list[str]:
    """Returns the command line of a small run on the data set in `data`."""
    return [sys.executable, os.path.join(ROOT, script), '--dataset', 'fashion_mnist_sample', '--data', data,
            '--init_channels', '2', '--layers', '3', '--batch_size', str(BATCH_SIZE[script]), '--epochs', str(EPOCHS),
            '--save_freq', '1', '--report_freq', '1', '--use_gpu', 'False', '--model_save_dir', folder, *flags]


def start(script: str, data: str, folder: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(command(script, data, folder, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(process: subprocess.Popen) -> None:
    """Waits for the end of a run; raises UserError with its last line on stderr when it fails."""
    error = process.communicate()[1].strip()
    if process.returncode:
        raise UserError(f"{os.path.basename(process.args[1])} ended with exit code {process.returncode}: "
                        f"{error.splitlines()[-1] if error else ''}")


def progress(folder: str) -> tuple[int | None, list[str]]:
    """Returns the number of steps in the last checkpoint (None without one), and the files that are being written."""
    names = sorted(path.name for path in Path(folder).glob('*'))
    checkpoints = re.findall(r'^checkpoint-(\d+)-(\d+)\.npz$', '\n'.join(names), re.M)
    steps = [int(epoch) * STEPS + int(step) for epoch, step in checkpoints]
    return steps[-1] if steps else None, [name for name in names if name.endswith('.part')]


def kill(process: subprocess.Popen, folder: str, moment: Moment) -> bool:
    """Sends SIGKILL at the moment; returns False when the run has ended before it."""
    if moment.kind != 'start':
        while process.poll() is None:
            steps, writing = progress(folder)
            if steps is not None and steps >= moment.target and (moment.kind == 'anywhere' or any(
                    name.startswith('checkpoint-') == (moment.kind == 'checkpoint') for name in writing)):
                break
            time.sleep(0.002 if moment.kind == 'anywhere' else 0)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment.delay)
    process.kill()
    return process.wait() < 0


def results_of(folder: str) -> dict:
    """Returns {file name: content} of a finished run, without the measured seconds."""
    results = {'names of the files': sorted(os.listdir(folder))}
    for path in Path(folder).iterdir():
        if path.suffix == '.npz':
            metadata, arrays = checkpoint.read_arrays(path)
            metadata.get('meter', {}).pop('seconds', None)
            results[path.name] = metadata, {key: (array.dtype.str, array.shape, array.tobytes())
                                            for key, array in arrays.items()}
        elif path.name in ('genotype.json', 'history.jsonl'):
            lines = map(json.loads, path.read_text(encoding='utf-8').splitlines())
            results[path.name] = [{key: value for key, value in line.items() if key != 'seconds'} for line in lines]
    return results


def differences(results: dict, other: dict) -> list[str]:
    """Returns the names of the entries in which two `results_of` differ."""
    return [name for name in sorted(set(results) | set(other)) if results.get(name) != other.get(name)]


def kill_and_resume(script: str, data: str, folder: str, moment: Moment, expected: dict) -> tuple[str, bool, list[str]]:
    """Kills and resumes a run; returns a description of the moment, whether a file was written, what differs."""
    for divisor in (1, 2, 4, 8, 16):           # on a busy machine a run may end before its moment
        shutil.rmtree(folder, ignore_errors=True)
        process = start(script, data, folder)
        if kill(process, folder, moment._replace(target=moment.target // divisor, delay=moment.delay / divisor ** 2)):
            break
        finish(process)
    else:
        raise UserError(f"{script} ended before it could be killed, five times")
    steps, writing = progress(folder)
    description = ('before the first checkpoint' if steps is None else
                   f'epoch {steps // STEPS + 1}, {steps % STEPS} of {STEPS} steps saved')
    description += f', writing {writing[0][:-len(".part")]}' if writing else ''
    finish(start(script, data, folder, *([] if steps is None else ['--resume'])))
    differing = differences(results_of(folder), expected)
    shutil.rmtree(folder)
    return description, bool(writing), differing


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--number', type=utils.number(int, 1), default=20, help='kills of each script (%(default)s)')
    parser.add_argument('--seed', type=utils.number(int, 0), default=0, help='seed of the moments (%(default)s)')
    parser.add_argument('--scripts', nargs='+', choices=BATCH_SIZE, default=BATCH_SIZE, help='scripts to kill (both)')
    parser.add_argument('--jobs', type=utils.number(int, 1), default=1, help='number of runs at a time (%(default)s)')
    args = parser.parse_args()
    began, kills, different, while_writing = time.time(), 0, 0, 0
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.jobs) as pool:
        data = os.path.join(root, 'data')
        make_sample.make(reader.default_folder('fashion_mnist_sample'), data, train=IMAGES, test=2)
        print(f"{'script':<16} {'kill':>4}  {'moment':<72} result")
        for script in args.scripts:
            folder, started = os.path.join(root, 'uninterrupted'), time.time()
            process = start(script, data, folder)
            while process.poll() is None and progress(folder)[0] is None:
                time.sleep(0.01)
            ready = time.time()
            finish(process)
            moments = draw_moments(args.number, args.seed, (time.time() - ready) / (EPOCHS * STEPS), ready - started)
            expected = results_of(folder)
            shutil.rmtree(folder)
            runs = [pool.submit(kill_and_resume, script, data, os.path.join(root, f'run{k}'), moment, expected)
                    for k, moment in enumerate(moments)]
            for k, run in enumerate(runs, 1):
                description, writing, differing = run.result()
                result = 'differs: ' + ', '.join(differing) if differing else 'equal'
                print(f"{script:<16} {k:>4}  {description:<72} {result}", flush=True)
                kills, different, while_writing = kills + 1, different + bool(differing), while_writing + writing
    print(f"{kills} kills, {while_writing} of them while a file was being written: {kills - different} runs equal to "
          f"the uninterrupted one, {different} different; {time.time() - began:.0f} s")
    sys.exit(1 if different else 0)


if __name__ == '__main__':
    utils.run(main)
