"""A run: its folder, its checkpoints and the loop, shared by the search and by both trainings.

A script describes what it trains as a task, an object with

    steps                       training steps an epoch
    batch(epoch, step)          the batch of a step; a pure function, called in background threads
    train_step(batch, epoch)    one step, -> (loss, top-1, top-5, images)
    learning_rate(epoch)
    finish_epoch(epoch)         validation and what else belongs to the end of an epoch,
                                -> what it adds to the epoch's line in history.jsonl
    state(), load_state(state)  {name: array}, everything that a step changes

and calls `train`. Batches are a function of (seed, epoch, step), so that a checkpoint needs no state of
a random generator to continue to the bit.
"""
import json
import logging
import math
import os
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from reader import prefetch
from utils import UserError, peak_memory

log = logging.getLogger('darts')

# Flags that do not change what is computed: a run may be resumed with others.
FREE_FLAGS = {'data', 'data_dir', 'model_save_dir', 'report_freq', 'save_freq', 'num_workers', 'use_gpu', 'resume'}
KEPT_CHECKPOINTS = 2


class Meter:
    """Means over the images of an epoch so far."""

    def __init__(self, loss=0.0, top1=0.0, top5=0.0, images=0, seconds=0.0):
        self.loss, self.top1, self.top5, self.images, self.seconds = loss, top1, top5, images, seconds

    def add(self, loss, top1, top5, images):
        self.loss += loss * images
        self.top1 += top1 * images
        self.top5 += top5 * images
        self.images += images

    def means(self, prefix):
        """{prefix_loss, prefix_top1, prefix_top5}; accuracies as fractions."""
        return {f'{prefix}_{name}': getattr(self, name) / self.images for name in ('loss', 'top1', 'top5')}


class Run:
    """The folder of a run: args.json, log.txt, history.jsonl and the checkpoints.

    args: the parsed flags of the script. Raises UserError when the folder cannot be written, when it
    holds a run already and args.resume is not set, and when there is nothing to resume.
    """

    def __init__(self, args):
        self.folder = args.model_save_dir
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        try:
            os.makedirs(self.folder, exist_ok=True)
            found = self.checkpoints()
            if found and not args.resume:
                raise UserError(f"{self.folder} holds a run already: continue it with --resume, "
                                "or choose another folder with --model_save_dir")
            if args.resume and not found:
                raise UserError(f"--resume: there is no checkpoint in {self.folder}")
            start_log(self.path('log.txt'))
            if not args.resume:
                self.write('args.json', json.dumps(vars(args), indent=2) + '\n')
                self.write('history.jsonl', '')
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        """Writes a file as a whole: aside, to the disk, then in place of the one before."""
        path = self.path(name)
        with open(path + '.part', 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.part', path)

    def checkpoints(self):
        """The names of the checkpoints, the oldest first."""
        return sorted(name for name in os.listdir(self.folder)
                      if name.startswith('checkpoint-') and name.endswith('.npz'))

    def save(self, state, epoch, step, meter):
        """Writes the checkpoint of the moment before (epoch, step) and drops all but the last two."""
        about = {'settings': self.settings, 'epoch': epoch, 'step': step, 'meter': vars(meter)}
        arrays = dict(state, about=np.frombuffer(json.dumps(about).encode(), 'uint8'))
        try:
            self.write(f'checkpoint-{epoch:04d}-{step:06d}.npz', lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise UserError(f"no checkpoint could be written to {self.folder}: {error.strerror or error}; "
                            "the one before is intact") from None
        for name in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            os.remove(self.path(name))

    def restore(self, task):
        """Loads the last readable checkpoint into the task, -> (epoch, step, meter) to go on from.

        Raises UserError when none can be read and when it is from a run with other settings.
        """
        for name in reversed(self.checkpoints()):
            try:
                about, state = read_checkpoint(self.path(name))
            except ValueError as error:
                log.warning(f"{self.path(name)} is damaged ({error}): trying the one before")
                continue
            theirs = about['settings']
            differing = [f"{key} {theirs.get(key)!r} there, {self.settings.get(key)!r} now"
                         for key in sorted(set(theirs) | set(self.settings))
                         if theirs.get(key) != self.settings.get(key)]
            if differing:
                raise UserError(f"{self.path(name)} is from a run with other settings: {'; '.join(differing)}")
            task.load_state(state)
            self._cut_history(about['epoch'])
            log.info(f"resumed from {self.path(name)}")
            return about['epoch'], about['step'], Meter(**about['meter'])
        raise UserError(f"none of the checkpoints in {self.folder} can be read")

    def add_history(self, record):
        with open(self.path('history.jsonl'), 'a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')

    def _cut_history(self, epoch):
        """Takes out of the history what the resumed run will do again, a line cut off half-way included."""
        with open(self.path('history.jsonl'), encoding='utf-8') as file:
            lines = file.readlines()[:epoch]
        self.write('history.jsonl', ''.join(lines))


def read_checkpoint(path):
    """-> (about, {name: array}) of a checkpoint; ValueError when it is damaged.

    A checkpoint is an .npz of plain arrays (nothing in it is executed); zip's checksum of each is
    verified in reading.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state = {name: arrays[name] for name in arrays.files}
        about = json.loads(state.pop('about').tobytes())
        if set(about) != {'settings', 'epoch', 'step', 'meter'}:
            raise ValueError("its description is incomplete")
        return about, state
    except Exception as error:         # zip, numpy and json fail in many ways on a damaged file
        raise ValueError(str(error) or type(error).__name__) from None


def start_log(path=None):
    """Sends log lines to the console, past the progress bar, and to the file `path`."""
    log.setLevel(logging.INFO)
    log.propagate = False            # Paddle gives the root logger a handler of its own
    log.handlers = [_Console()]
    if path:
        handler = logging.FileHandler(path, encoding='utf-8')
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        log.addHandler(handler)


class _Console(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Progress(tqdm):
    """A bar with the step, images per second and the time left."""

    def __init__(self, images, **kwargs):
        self.images = images                     # a step
        patient = 0.3 if sys.stderr.isatty() else 30.0          # seconds between lines in a log
        super().__init__(mininterval=patient, dynamic_ncols=True, leave=False, bar_format=(
            '{desc} {bar} step {n_fmt}/{total_fmt}, {images_per_second} images/s, {remaining} left{postfix}'),
            **kwargs)

    @property
    def format_dict(self):
        values = super().format_dict
        rate = values['rate'] or (values['n'] - values['initial']) / max(values['elapsed'], 1e-9)
        return dict(values, images_per_second=f'{rate * self.images:.1f}')


class _Stop:
    """Remembers the first SIGINT or SIGTERM; the second one ends the process at once."""

    def __enter__(self):
        self.signal = None
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number, frame):
        self.signal = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def exit(self, where):
        """Ends the process as the signal asked for; a checkpoint has been saved."""
        log.info(f"stopped {where}; --resume continues from here")
        sys.exit(128 + self.signal)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(task, run, args):
    """Trains `task` for args.epochs epochs, from where the last checkpoint of `run` stands if args.resume."""
    if args.resume:
        epoch, step, meter = run.restore(task)
    else:
        epoch, step, meter = 0, 0, Meter()
        run.save(task.state(), epoch, step, meter)
    with _Stop() as stop:
        while epoch < args.epochs:
            began, waited = time.time(), 0.0
            started = began - meter.seconds              # of the epoch, before a resume too
            batches = prefetch(lambda s: task.batch(epoch, s), range(step, task.steps), args.num_workers)
            with Progress(args.batch_size, total=task.steps, initial=step,
                          desc=f'epoch {epoch + 1}/{args.epochs}') as bar:
                while step < task.steps:
                    asked = time.time()
                    batch = next(batches)
                    waited += time.time() - asked
                    loss, top1, top5, images = task.train_step(batch, epoch)
                    if not math.isfinite(loss):
                        raise UserError(
                            f"the loss is {loss} at step {step + 1} of epoch {epoch + 1}, learning rate "
                            f"{task.learning_rate(epoch):.6g}; the last good checkpoint is "
                            f"{run.path(run.checkpoints()[-1])}")
                    meter.add(loss, top1, top5, images)
                    step += 1
                    bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
                    bar.update()
                    meter.seconds = time.time() - started
                    if step % args.report_freq == 0 or step == task.steps:
                        report(epoch, step, task, meter)
                    if stop.signal or (step % args.save_freq == 0 and step < task.steps):
                        run.save(task.state(), epoch, step, meter)
                    if stop.signal:
                        bar.close()
                        stop.exit(f"after step {step} of epoch {epoch + 1}")
            waiting = 100 * waited / (time.time() - began)
            validation = task.finish_epoch(epoch)
            log.info(f"epoch {epoch + 1}: {waiting:.1f} % of the training time was spent waiting for input, "
                     f"peak memory {peak_memory():.2f} GB")
            run.add_history(dict(epoch=epoch + 1, lr=task.learning_rate(epoch), **meter.means('train'), **validation,
                                 seconds=round(time.time() - started, 3)))
            epoch, step, meter = epoch + 1, 0, Meter()
            run.save(task.state(), epoch, step, meter)
            if stop.signal and epoch < args.epochs:
                stop.exit(f"after epoch {epoch}")


def report(epoch, step, task, meter):
    means = meter.means('train')
    log.info(f"epoch {epoch + 1} step {step}/{task.steps}: loss {means['train_loss']:.4f}, "
             f"top-1 {100 * means['train_top1']:.2f} %, top-5 {100 * means['train_top5']:.2f} %, "
             f"lr {task.learning_rate(epoch):.6g}")


def evaluate(network, batches, steps, batch_size):
    """Mean loss, top-1 and top-5 of network.evaluate over all images of `batches`, as a Meter."""
    meter = Meter()
    with Progress(batch_size, total=steps, desc='validation') as bar:
        for images, labels in batches:
            meter.add(*network.evaluate(images, labels), len(labels))
            bar.update()
    return meter
