"""A run: its folder, its checkpoints and the loop, shared by the search and by both trainings.

`Training` is the task of train.py and train_imagenet.py; the search has its own in train_search.py.

A script describes what it trains as a task, an object with

    steps                       training steps an epoch
    batch(epoch, step)          the batch of a step; a pure function, called in background threads
    train_step(batch, epoch, step)      -> (loss, top-1, top-5, images)
    learning_rate(epoch)
    finish_epoch(epoch)         validation and what else belongs to the end of an epoch,
                                -> what it adds to the epoch's line in history.jsonl
    state(), load_state(state)  {name: array}, everything that a step changes
    over(record)                why the run ends with this line of history.jsonl, or None; optional

and calls `run_epochs`. Batches are a function of (seed, epoch, step), so that a checkpoint needs no state of
a random generator to continue to the bit.

With several processes (distributed.py) `batch` is the process's part of the batch, `train_step` leaves the same state
in all of them, and the main one writes.
"""
import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import sys
import time
import zipfile

import numpy as np
import paddle
from tqdm import tqdm

import custom_ops
import distributed
import genotypes
import utils
from parameters import MomentumSGD
from dashboard import Dashboard
from reader import DROP_PATH, prefetch
from utils import UserError, peak_memory

log = logging.getLogger('darts')

# Flags that do not change what is computed: a run may be resumed with others.
FREE_FLAGS = {'data', 'data_dir', 'model_save_dir', 'report_freq', 'save_freq', 'num_workers', 'use_gpu', 'custom_ops',
              'resume', 'arch', 'pretrained', 'eval_only', 'visualdl',
              'stop_at_skips'}                                      # of arch the genotype itself is compared
KEPT_CHECKPOINTS = 2


class Meter:
    """Means over the images of an epoch so far."""

    def __init__(self, loss=0.0, top1=0.0, top5=0.0, images=0, seconds=0.0):
        self.loss, self.top1, self.top5, self.images, self.seconds = loss, top1, top5, images, seconds

    def add(self, loss, top1, top5, images):
        self.loss += loss * images
        self.top1 += round(top1 * images)          # a number of images, which single precision only nearly gives
        self.top5 += round(top5 * images)
        self.images += images

    def means(self, prefix):
        """{prefix_loss, prefix_top1, prefix_top5}; accuracies as fractions."""
        return {f'{prefix}_{name}': getattr(self, name) / self.images for name in ('loss', 'top1', 'top5')}


class Run:
    """The folder of a run: args.json, log.txt, history.jsonl and the checkpoints.

    args: the parsed flags of the script. Raises UserError when the folder cannot be written, when another
    run is in it, when it holds a run already and args.resume is not set, and when there is nothing to
    resume. Processes other than the main one write nothing.
    """

    def __init__(self, args):
        self.folder = args.model_save_dir
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        self.dashboard = None
        self.last = None                           # the last checkpoint that was written or read
        if not distributed.main:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock()
            found = self.checkpoints()
            if found and not args.resume:
                raise UserError(f"{self.folder} holds a run already: continue it with --resume, "
                                "or choose another folder with --model_save_dir")
            if args.resume and not found:
                raise UserError(f"--resume: there is no checkpoint in {self.folder}")
            for name in os.listdir(self.folder):   # what a killed run was writing
                if name.startswith('checkpoint-') and name.endswith('.npz.part'):
                    os.remove(self.path(name))
            if args.visualdl:
                self.dashboard = Dashboard(args.visualdl, args.resume)
            start_log(self.path('log.txt'))
            if not args.resume:
                utils.write_file(self.path('args.json'), json.dumps(vars(args), indent=2) + '\n')
                utils.write_file(self.path('history.jsonl'), '')
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def _lock(self):
        """Keeps other runs out of the folder for as long as this process lives, however it ends."""
        file = os.open(self.path('lock'), os.O_RDWR | os.O_CREAT, 0o666)           # and never closed
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is at work in {self.folder}: wait until it has ended, "
                            "or choose another folder with --model_save_dir") from None
        except OSError:
            pass                 # a file system without locks

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        """`utils.write_file` of a file in the folder; UserError when it cannot be written."""
        if not distributed.main:
            return
        try:
            utils.write_file(self.path(name), content)
        except OSError as error:
            raise UserError(f"cannot write {self.path(name)}: {error.strerror or error}; the last checkpoint is "
                            "intact, --resume continues from it") from None

    def checkpoints(self):
        """The names of the checkpoints, the oldest first."""
        return sorted(name for name in os.listdir(self.folder)
                      if name.startswith('checkpoint-') and name.endswith('.npz'))

    def save(self, state, epoch, step, meter):
        """Writes the checkpoint of the moment before (epoch, step) and drops all but the last two."""
        if not distributed.main:
            return
        about = {'settings': self.settings, 'epoch': epoch, 'step': step, 'meter': vars(meter)}
        path = self.path(f'checkpoint-{epoch:04d}-{step:06d}.npz')
        try:
            utils.write_file(path, lambda file: write_arrays(file, about, state))
            self.last = path
            for name in self.checkpoints()[:-KEPT_CHECKPOINTS]:
                os.remove(self.path(name))
        except OSError as error:
            raise UserError(f"no checkpoint could be written to {self.folder}: {error.strerror or error}; "
                            "the one before is intact") from None

    def restore(self, task):
        """Loads the last readable checkpoint into the task, -> (epoch, step, meter) to go on from.

        Damaged ones are renamed, so that they are none of the last two. Raises UserError when none can be read and
        when it is from a run with other settings.
        """
        damaged = []
        for name in reversed(self.checkpoints()):
            try:
                about, state = read_checkpoint(self.path(name))
            except ValueError as error:
                log.warning(f"{self.path(name)} is damaged ({error}): trying the one before")
                damaged.append(name)
                continue
            theirs = about['settings']
            differing = [f"{key} {theirs.get(key)!r} there, {self.settings.get(key)!r} now"
                         for key in sorted(set(theirs) | set(self.settings))
                         if theirs.get(key) != self.settings.get(key)]
            if differing:
                raise UserError(f"{self.path(name)} is from a run with other settings: {'; '.join(differing)}")
            shapes, expected = ({name: array.shape for name, array in each.items()} for each in (state, task.state()))
            if shapes != expected:
                raise UserError(f"{self.path(name)} is from another version of this program: it holds {shapes}, "
                                f"expected {expected}")
            task.load_state(state)
            self._cut_history(about['epoch'])
            if self.dashboard:
                self.dashboard.cut(about['epoch'], about['epoch'] * task.steps + about['step'])
            for each in damaged:
                with contextlib.suppress(OSError):
                    os.replace(self.path(each), self.path(each + '.damaged'))
            self.last = self.path(name)
            log.info(f"resumed from {self.last}")
            return about['epoch'], about['step'], Meter(**about['meter'])
        raise UserError(f"none of the checkpoints in {self.folder} can be read")

    def add_history(self, record):
        if not distributed.main:
            return
        path = self.path('history.jsonl')
        try:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
                file.flush()
                os.fsync(file.fileno())            # the checkpoint that follows counts on the line
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; the last checkpoint is intact, "
                            "--resume continues from it") from None
        if self.dashboard:
            self.dashboard.add_epoch(record)

    def history(self):
        """The lines of history.jsonl, a dict an epoch; `restore` has taken out what the run will do again."""
        try:
            with open(self.path('history.jsonl'), encoding='utf-8') as file:
                return [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path('history.jsonl')}: {error}") from None

    def _cut_history(self, epoch):
        """Takes out of the history what the resumed run will do again, and damaged lines, of which it warns."""
        path, lines = self.path('history.jsonl'), []
        try:
            with open(path, 'rb') as file:
                lines = [line for line in file if 0 < _epoch_of(line) <= epoch]
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        if len(lines) != epoch:
            log.warning(f"{path} is damaged: it has {len(lines)} lines for the {epoch} epochs before")
        self.write('history.jsonl', b''.join(lines))


def _epoch_of(line):
    """The epoch that a line of history.jsonl (bytes) is about; 0 when it is damaged or was cut off half-way."""
    try:
        epoch = json.loads(line)['epoch'] if line.endswith(b'\n') else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return epoch if type(epoch) is int else 0


def verify_zip(path):
    """Verifies the checksums of a zip file; raises ValueError or what zipfile has to say when it is damaged.

    To be called first: who reads an array stops where the array's own header says, and zip compares the checksum at
    the end of what it holds only, which an altered header keeps the reader from.
    """
    with zipfile.ZipFile(path) as file:
        # Nothing in it is compressed, so that it cannot unpack to more than it is.
        if sum(member.file_size for member in file.infolist()) > os.path.getsize(path):
            raise ValueError("what it holds claims to be larger than the file")
        damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged!r} in it is wrong")


def read_arrays(path):
    """-> (about, {name: array}) of an .npz that `Run` wrote; ValueError when it is damaged.

    It holds plain arrays, nothing in it is executed; zip's checksum of each is verified.
    """
    try:
        verify_zip(path)
        with np.load(path, allow_pickle=False) as arrays:
            state = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(array, np.ndarray) for array in state.values()):
            raise ValueError("it holds something that is no array")
        return json.loads(state.pop('about').tobytes()), state
    except Exception as error:         # zip, numpy and json fail in many ways on a damaged file
        raise ValueError(str(error) or type(error).__name__) from None


def write_arrays(file, about, arrays):
    """Writes {name: array}, and `about` (anything that JSON can hold), as an .npz."""
    np.savez(file, **arrays, about=np.frombuffer(json.dumps(about).encode(), 'uint8'))


def read_checkpoint(path):
    """-> (about, {name: array}) of a checkpoint; ValueError when it is damaged."""
    about, state = read_arrays(path)
    if not isinstance(about, dict) or set(about) != {'settings', 'epoch', 'step', 'meter'}:
        raise ValueError("its description is incomplete")
    meter = about['meter']
    if not (isinstance(about['settings'], dict) and isinstance(meter, dict) and set(meter) == set(vars(Meter()))
            and all(type(about[name]) is int and about[name] >= 0 for name in ('epoch', 'step'))
            and all(type(value) in (int, float) for value in meter.values())):
        raise ValueError("its description is not that of a checkpoint")
    return about, state


def read_weights(path):
    """-> (about, {name: array}) of the weights that a training or a conversion wrote.

    about: {'genotype', 'dataset', 'class_names', 'mean', 'std'}, without what is not known. Raises
    UserError for anything else.
    """
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing: give the last.npz or best.npz of a training")
        about, weights = read_arrays(path)
        if not isinstance(about, dict) or 'settings' in about:
            raise ValueError("it is a checkpoint; the weights are in last.npz and best.npz beside it")
        return about, weights
    except ValueError as error:
        raise UserError(f"{path} holds no weights ({error}); those of PyTorch are converted by "
                        "scripts/convert_weights.py") from None


def genotype_of(path, about, arch=None):
    """The genotype that weights from `read_weights(path)` belong to: what they say of themselves, or else `arch`.

    Raises UserError when neither is there and when the two differ.
    """
    try:
        genotype = genotypes.check(about['genotype']) if about.get('genotype') else None
    except ValueError as error:
        raise UserError(f"{path} names no valid genotype: {error}") from None
    asked = genotypes.load(arch) if arch else genotype
    if not asked:
        raise UserError(f"{path} does not say its genotype: give --arch")
    if genotype not in (None, asked):
        raise UserError(f"{path} was trained with another genotype than {arch}")
    return asked


def start_log(path=None):
    """Sends log lines to the console, past the progress bar, and to the file `path`; only the main process talks."""
    log.setLevel(logging.INFO if distributed.main else logging.WARNING)
    log.propagate = False            # Paddle gives the root logger a handler of its own
    log.handlers = [_Console()]
    if path:
        handler = _LogFile(path, encoding='utf-8')
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        log.addHandler(handler)


class _Console(logging.Handler):
    def emit(self, record):
        with contextlib.suppress(OSError):         # the terminal is gone: the run is not, and has its log.txt
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    def handleError(self, record):
        """A full disk costs lines of the log; what it means for the run is said where a checkpoint is written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Progress(tqdm):
    """A bar with the step, images per second and the time left."""

    def __init__(self, images, **kwargs):
        self.images = images                     # a step
        patient = 0.3 if sys.stderr.isatty() else 30.0          # seconds between lines in a log
        super().__init__(mininterval=patient, dynamic_ncols=True, leave=False, bar_format=(
            '{desc} {bar} step {n_fmt}/{total_fmt}, {images_per_second} images/s, {remaining} left{postfix}'),
            disable=not distributed.main, **kwargs)

    @property
    def format_dict(self):
        values = super().format_dict
        rate = values['rate'] or (values['n'] - values['initial']) / max(values['elapsed'], 1e-9)
        return dict(values, images_per_second=f'{rate * self.images:.1f}')


class _Stop:
    """Remembers the first SIGINT or SIGTERM; the second one ends the process at once.

    Not under launch: it sends its SIGTERM several times in a row, and kills what does not end.
    """

    def __enter__(self):
        self.signal = None
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number, frame):
        self.signal = self.signal or number
        if not distributed.launched:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)

    def wanted(self):
        return self.signal is not None or distributed.orphaned()

    def exit(self, where):
        """Ends the process as the signal asked for; a checkpoint has been saved."""
        if distributed.launched:
            for each in self._before:                            # or its next SIGTERM would interrupt the wait
                signal.signal(each, signal.SIG_IGN)
        distributed.wait()       # for the main one, which saves: launch ends all when one has ended
        log.info(f"stopped {where}; --resume continues from here")
        sys.exit(128 + (self.signal or signal.SIGTERM))          # another process may have got the signal

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_epochs(task, run, args):
    """Trains `task` for args.epochs epochs, from where the last checkpoint of `run` stands if args.resume."""
    epoch, step, meter = _begin(task, run, args)
    over = why_over(task, run.history()[-1:]) if args.resume and distributed.main else None
    ended, = distributed.total([over is not None])
    if epoch >= args.epochs and not ended:
        log.info(f"all {args.epochs} epochs were done already")
    with _Stop() as stop:
        while epoch < args.epochs and not ended:
            began, waited, talked = time.time(), 0.0, distributed.seconds
            started = began - meter.seconds              # of the epoch, before a resume too
            batches = prefetch(lambda s: task.batch(epoch, s), range(step, task.steps), args.num_workers)
            with Progress(args.batch_size, total=task.steps, initial=step,
                          desc=f'epoch {epoch + 1}/{args.epochs}') as bar:
                while step < task.steps:
                    asked = time.time()
                    batch = next(batches)
                    waited += time.time() - asked
                    loss, top1, top5, images = task.train_step(batch, epoch, step)
                    # All processes see the same numbers, and so all stop after the same step.
                    loss, top1, top5, stopping = distributed.mean([loss, top1, top5, stop.wanted()])
                    if not math.isfinite(loss):
                        raise _diverged(f"the loss is {loss} at", task, run, epoch, step + 1)
                    meter.add(loss, top1, top5, images * distributed.processes)
                    step += 1
                    bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
                    bar.update()
                    meter.seconds = time.time() - started
                    if step % args.report_freq == 0 or step == task.steps:
                        report(epoch, step, task, meter)
                        if run.dashboard:
                            run.dashboard.add_step(epoch * task.steps + step,
                                                   dict(meter.means('train'), lr=task.learning_rate(epoch)))
                    if stopping or step % args.save_freq == 0 or step == task.steps:
                        state = _finite_state(task, run, epoch, step)
                        if stopping or step < task.steps:
                            run.save(state, epoch, step, meter)
                    if stopping:
                        bar.close()
                        stop.exit(f"after step {step} of epoch {epoch + 1}")
            part = 100 / (time.time() - began)
            talking = (f", {part * (distributed.seconds - talked):.1f} % for what the processes exchange"
                       if distributed.processes > 1 else '')
            validation = task.finish_epoch(epoch)
            log.info(f"epoch {epoch + 1}: {part * waited:.1f} % of the training time was spent waiting for input"
                     f"{talking}, peak memory {peak_memory():.2f} GB")
            record = dict(epoch=epoch + 1, lr=task.learning_rate(epoch), **meter.means('train'), **validation,
                          seconds=round(time.time() - started, 3))
            run.add_history(record)
            epoch, step, meter = epoch + 1, 0, Meter()
            run.save(task.state(), epoch, step, meter)
            over = why_over(task, [record]) if distributed.main else None
            stopping, ended = distributed.total([stop.wanted(), over is not None])
            if stopping and epoch < args.epochs and not ended:
                stop.exit(f"after epoch {epoch}")
    if over:
        log.info(over)


def why_over(task, records):
    """Why a run ends early, as its task says of the last epoch's record (none: before the first epoch's end)."""
    return task.over(records[-1]) if records and hasattr(task, 'over') else None


def _finite_state(task, run, epoch, step):
    """task.state(); UserError when a number in it is not finite: a loss is one of the weights before the step."""
    state = task.state()
    broken = [name for name, array in state.items() if not np.isfinite(array).all()]
    if broken:
        raise _diverged(f"{', '.join(broken)}: not all numbers are finite after", task, run, epoch, step)
    return state


def _diverged(what, task, run, epoch, step):
    return UserError(f"{what} step {step} of epoch {epoch + 1}, learning rate {task.learning_rate(epoch):.6g}; "
                     f"the last good checkpoint is {run.last or f'in {run.folder}'}")


def _begin(task, run, args):
    """-> (epoch, step, meter) to go on from; all processes have the state of the main one then."""
    distributed.wait()           # who has its graph ready first
    epoch, step, meter = 0, 0, Meter()
    if args.resume and distributed.main:
        epoch, step, meter = run.restore(task)
    elif not args.resume:
        run.save(task.state(), epoch, step, meter)
    if distributed.processes > 1:
        state = distributed.of_main(dict(task.state(), begin=np.array([epoch, step, *vars(meter).values()], 'float64')))
        epoch, step, *sums = state.pop('begin').tolist()
        task.load_state(state)
        epoch, step, meter = int(epoch), int(step), Meter(*sums)
    return epoch, step, meter


def report(epoch, step, task, meter):
    log.info(f"epoch {epoch + 1} step {step}/{task.steps}: {as_text(meter.means('train'), 'train')}, "
             f"lr {task.learning_rate(epoch):.6g}")


def evaluate(network, batches, args):
    """Mean loss, top-1 and top-5 over all images of `batches`, every one counted once, as a Meter."""
    meter = Meter()
    ahead = prefetch(lambda step: batches.batch(0, step), range(len(batches)), args.num_workers)
    with Progress(args.batch_size, total=len(batches), desc='validation') as bar:
        for images, labels in ahead:
            if len(labels):                    # of a small last batch there is not always a part for every process
                meter.add(*network.evaluate(images, labels), len(labels))
            bar.update()
    return Meter(*distributed.total([meter.loss, meter.top1, meter.top5, meter.images]))


def as_text(means, prefix):
    """The means of a Meter as one phrase."""
    return (f"loss {means[prefix + '_loss']:.4f}, top-1 {100 * means[prefix + '_top1']:.2f} %, "
            f"top-5 {100 * means[prefix + '_top5']:.2f} %")


class Training:
    """The training of a discrete network from scratch, as a task of `run_epochs`.

    network: a model.Network; batches, test: batches of the training and of the test set, as
    reader.Batches; learning_rate(epoch); about: what the files of weights say of themselves.
    """

    def __init__(self, args, network, batches, test, learning_rate, run, about):
        self.args, self.network, self.batches, self.test = args, network, batches, test
        self.learning_rate, self.run, self.about = learning_rate, run, about
        self.optimizer = MomentumSGD(network.store, args.momentum, args.weight_decay, args.grad_clip)
        self.steps, self.batch = len(batches), batches.batch
        self.best_top1 = -1.0

    def drop_path_prob(self, epoch):
        """Rises linearly over the epochs, from 0."""
        return self.args.drop_path_prob * epoch / self.args.epochs

    def train_step(self, batch, epoch, step):
        key = [self.args.seed, DROP_PATH, epoch, step] + [distributed.rank] * (not distributed.main)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        result = self.network.run(self.network.feed(*batch), self.drop_path_prob(epoch), seed)
        distributed.average(self.network.store, 'gradient', 'statistics')
        self.optimizer.step(self.learning_rate(epoch))
        return (*result, len(batch[0]))

    def finish_epoch(self, epoch):
        result = evaluate(self.network, self.test, self.args).means('valid')
        top1 = result['valid_top1']
        names = ['last.npz']
        if top1 > self.best_top1:
            self.best_top1 = top1
            names.append('best.npz')
        for name in names:
            self.run.write(name, lambda file: write_arrays(file, self.about, self.network.weights()))
        log.info(f"epoch {epoch + 1}: test {as_text(result, 'valid')}, best top-1 {100 * self.best_top1:.2f} %")
        return dict(result, best_top1=self.best_top1, drop_path_prob=self.drop_path_prob(epoch))

    def state(self):
        state = {name: self.network.store.get(name) for name in ('theta', 'velocity', 'statistics')}
        return dict(state, best_top1=np.array(self.best_top1))

    def load_state(self, state):
        self.best_top1 = float(state.pop('best_top1'))
        for name, array in state.items():
            self.network.store.set(name, array)


def train_or_evaluate(args, place, genotype, data, make_network, train, test, learning_rate):
    """What train.py and train_imagenet.py do: --eval_only or a training.

    place: from `start`; data: has name, class_names, mean and std; make_network(**settings): a
    model.Network; train(), test(): the batches of both sets; learning_rate(epoch).
    """
    pretrained = read_weights(args.pretrained)[1] if args.pretrained else None
    test = test()
    if args.eval_only:
        set_up(args, place)
        network = make_network(trained=False, place=place)
        network.load_weights(pretrained)
        meter = evaluate(network, test, args)
        log.info(f"{as_text(meter.means('test'), 'test')} ({meter.images:.0f} images)")
        return
    # A genotype.json may change before the run is resumed.
    args.genotype = json.loads(genotypes.dumps(genotype))
    batches, run = train(), Run(args)
    set_up(args, place)
    network = make_network(auxiliary=args.auxiliary_weight if args.auxiliary else 0.0, seed=args.seed,
                           drops_paths=args.drop_path_prob > 0, place=place)
    if pretrained:
        network.load_weights(pretrained)
    about = {'genotype': args.genotype, 'dataset': data.name, 'class_names': data.class_names,
             'mean': data.mean.tolist(), 'std': data.std.tolist()}
    training = Training(args, network, batches, test, learning_rate, run, about)
    log.info(f"param size = {network.param_count / 1e6:.6f}MB")
    log.info(f"multiply-adds = {network.multiply_adds / 1e6:.1f}M per image")
    announce_graph(network.store)
    run_epochs(training, run, args)


def start(args):
    """Begins a script: finds the other processes and the log, -> the place to compute on."""
    if args.batch_size % distributed.processes:
        raise UserError(f"--batch_size {args.batch_size} is the batch of all {distributed.processes} processes "
                        f"together: it has to be a multiple of {distributed.processes}")
    place = utils.find_place(args.use_gpu)
    distributed.connect(place)
    start_log()
    return place


def set_up(args, place):
    """Says on what the run computes, and chooses the operators for it."""
    utils.announce(log, place, distributed.processes)
    distributed.one_then_all(lambda: custom_ops.enable(args.custom_ops and isinstance(place, paddle.CPUPlace)))


def announce_graph(store):
    """Prepares all programs of a store and says how long everything took until here."""
    store.warm_up()
    log.info(f"graph ready in {utils.seconds_since_start():.1f} s ({store.operators} operators)")
