"""The folder of a run: settings, log, history, checkpoints and weight files.

Files are written atomically. Everything that a run needs to continue is in a checkpoint: the state of its task and the
settings, epoch, step and meter in the metadata.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import zipfile

import numpy as np

import utils
from engine import distributed
from engine.console import log, start_log
from engine.dashboard import Dashboard
from utils import UserError

# Flags that do not change what is computed: a run may be resumed with other values. Of --arch the genotype is compared.
FREE_FLAGS = {'data', 'data_dir', 'model_save_dir', 'report_freq', 'save_freq', 'num_workers', 'use_gpu', 'custom_ops',
              'deterministic', 'resume', 'arch', 'pretrained', 'eval_only', 'visualdl', 'stop_at_skips',
              'curvature_freq', 'stop_at_curvature', 'recipe', 'random'}
# Flags that older checkpoints of this version lack, with the value that they stand for.
ADDED_FLAGS = {'partial_channels': 1, 'arch_start_epoch': 0}
KEPT_CHECKPOINTS = 2
RESULTS = 'genotype.json', 'best.npz', 'last.npz'      # of a run; they outlive checkpoints that a user removes
METADATA = 'about'                 # the entry of an .npz that holds the metadata, named so since version 0.1


class Meter:
    """Means over the images of an epoch so far."""

    def __init__(self, loss: float = 0.0, top1: float = 0.0, top5: float = 0.0, images: float = 0,
                 seconds: float = 0.0):
        self.loss, self.top1, self.top5, self.images, self.seconds = loss, top1, top5, images, seconds

    def add(self, loss: float, top1: float, top5: float, images: int) -> None:
        """Adds a batch: mean loss, accuracies as fractions, number of images."""
        self.loss += loss * images
        self.top1 += round(top1 * images)          # an integer, which the fraction gives only to single precision
        self.top5 += round(top5 * images)
        self.images += images

    def means(self, prefix: str) -> dict[str, float]:
        """Returns {prefix_loss, prefix_top1, prefix_top5}; accuracies are fractions."""
        return {f'{prefix}_{name}': getattr(self, name) / self.images for name in ('loss', 'top1', 'top5')}


class Run:
    """The folder of a run: args.json, log.txt, history.jsonl, checkpoints and weight files.

    args: the parsed flags of the script; args.resume is set to False when there is no checkpoint to resume from, as in
    a job that is started again before its first checkpoint. Raises UserError when the folder cannot be written, when
    another run is active in it, and when it holds a run or its results and args.resume is not set. Only rank 0 writes.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.model_save_dir
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        self.dashboard: Dashboard | None = None
        self.last_checkpoint: str | None = None    # path of the last one that was written or read
        if not distributed.is_main:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock()
            existing = self.checkpoints()
            if existing and not args.resume:
                raise UserError(f"{self.folder} already holds a run: continue it with --resume, "
                                "or choose another folder with --model_save_dir")
            results = [name for name in RESULTS if os.path.exists(self.path(name))]
            if results and not args.resume:
                raise UserError(f"{self.folder} already holds {results[0]}, which this run would overwrite: choose "
                                "another folder with --model_save_dir")
            for name in os.listdir(self.folder):   # left by a run that was killed while it wrote a checkpoint
                if name.startswith('checkpoint-') and name.endswith('.npz.part'):
                    os.remove(self.path(name))
            if args.visualdl:
                self.dashboard = Dashboard(args.visualdl, bool(args.resume and existing))
            start_log(self.path('log.txt'))
            if args.resume and not existing:
                log.info(f"--resume: there is no checkpoint in {self.folder}, so the run starts from scratch")
                args.resume = False
            if not args.resume:
                utils.write_file(self.path('args.json'), self._args_as_json())
                utils.write_file(self.path('history.jsonl'), '')
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def _lock(self) -> None:
        """Keeps other runs out of the folder until this process ends, in whatever way it ends."""
        file = os.open(self.path('lock'), os.O_RDWR | os.O_CREAT, 0o666)           # never closed
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is active in {self.folder}: wait until it has ended, "
                            "or choose another folder with --model_save_dir") from None
        except OSError:
            pass                 # a file system without locks

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, name: str, content) -> None:
        """Writes a file of the folder with `utils.write_file`; raises UserError when it cannot be written."""
        if not distributed.is_main:
            return
        try:
            utils.write_file(self.path(name), content)
        except OSError as error:
            raise UserError(f"cannot write {self.path(name)}: {error.strerror or error}; {self._remedy()}") from None

    def _remedy(self) -> str:
        """Returns what to do after a file could not be written."""
        return ("the last checkpoint is intact, --resume continues from it" if self.last_checkpoint else
                "there is no checkpoint yet: make space, or choose another --model_save_dir, and start again")

    def _args_as_json(self) -> str:
        return json.dumps(vars(self.args), indent=2) + '\n'

    def checkpoints(self) -> list[str]:
        """Returns the names of the checkpoints, the oldest first."""
        return sorted(name for name in os.listdir(self.folder)
                      if name.startswith('checkpoint-') and name.endswith('.npz'))

    def save(self, state: dict[str, np.ndarray], epoch: int, step: int, meter: Meter) -> None:
        """Writes the checkpoint before (epoch, step), both counted from 0, and removes all but the last two."""
        if not distributed.is_main:
            return
        metadata = {'version': utils.VERSION, 'settings': self.settings, 'epoch': epoch, 'step': step,
                    'meter': vars(meter)}
        path = self.path(f'checkpoint-{epoch:04d}-{step:06d}.npz')
        try:
            utils.write_file(path, lambda file: write_arrays(file, metadata, state))
            self.last_checkpoint = path
            for name in self.checkpoints()[:-KEPT_CHECKPOINTS]:
                os.remove(self.path(name))
        except OSError as error:
            raise UserError(f"no checkpoint could be written to {self.folder}: {error.strerror or error}; "
                            f"{self._remedy()}") from None

    def restore(self, task) -> tuple[int, int, Meter]:
        """Loads the last readable checkpoint into the task and returns the (epoch, step, meter) to continue from.

        Damaged checkpoints are renamed, so that they do not count as one of the last two. Raises UserError when none
        can be read, and for a checkpoint of other settings or of another version.
        """
        damaged = []
        for name in reversed(self.checkpoints()):
            try:
                metadata, state = read_checkpoint(self.path(name))
            except ValueError as error:
                log.warning(f"{self.path(name)} is damaged ({error}): trying the one before")
                damaged.append(name)
                continue
            longer = self._check_settings(name, metadata['settings'])
            # Not their shapes: the vector of architecture parameters was [2, edges, primitives] once.
            sizes, expected = ({name: array.size for name, array in arrays.items()}
                               for arrays in (state, task.store.state()))
            if sizes != expected:
                raise UserError(f"{self.path(name)} does not fit this network: it holds {sizes}, expected {expected}")
            task.store.load_state(state)
            self.last_checkpoint = self.path(name)
            self._cut_history(metadata['epoch'])
            if self.dashboard:
                self.dashboard.cut(metadata['epoch'], metadata['epoch'] * task.steps + metadata['step'])
            for damaged_name in damaged:
                with contextlib.suppress(OSError):
                    os.replace(self.path(damaged_name), self.path(damaged_name + '.damaged'))
            log.info(f"resumed from {self.last_checkpoint}")
            if longer:
                log.info(f"--epochs {longer}: the schedule ends later, so the learning rates of the epochs to come are "
                         f"those of a run of {self.settings['epochs']} epochs")
                self.write('args.json', self._args_as_json())
            return metadata['epoch'], metadata['step'], Meter(**metadata['meter'])
        raise UserError(f"none of the checkpoints in {self.folder} can be read")

    def _check_settings(self, name: str, saved: dict) -> str | None:
        """Raises UserError when the settings of a checkpoint differ from those of this run, except for more epochs.

        Returns a phrase about the additional epochs, or None.
        """
        saved = {**{key: value for key, value in ADDED_FLAGS.items() if key in self.settings}, **saved}
        before, now = saved.get('epochs'), self.settings.get('epochs')
        longer = type(before) is int and type(now) is int and before < now
        differing = [f"{key} {_as_text(saved.get(key))} there, {_as_text(self.settings.get(key))} now"
                     for key in sorted(set(saved) | set(self.settings))
                     if saved.get(key) != self.settings.get(key) and not (longer and key == 'epochs')]
        if differing:
            raise UserError(f"{self.path(name)} is from a run with other settings: {'; '.join(differing)}")
        return f"{now} instead of {before}" if longer else None

    def add_history(self, record: dict, tables: dict[str, tuple]) -> None:
        """Appends a line to history.jsonl, and its curves to the dashboard; tables: as of `Dashboard.add_epoch`."""
        if not distributed.is_main:
            return
        path = self.path('history.jsonl')
        try:
            with open(path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
                file.flush()
                os.fsync(file.fileno())            # the checkpoint that follows assumes that the line is on the disk
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; {self._remedy()}") from None
        if self.dashboard:
            self.dashboard.add_epoch(record, tables)

    def history(self) -> list[dict]:
        """Returns the lines of history.jsonl, one per epoch; `restore` has removed those that the run will repeat."""
        try:
            with open(self.path('history.jsonl'), encoding='utf-8') as file:
                return [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path('history.jsonl')}: {error}") from None

    def _cut_history(self, epoch: int) -> None:
        """Removes the lines that the resumed run will write again, and damaged lines, with a warning."""
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


def _as_text(setting) -> str:
    """Returns a setting as text, names as the value of their flag."""
    names = isinstance(setting, list) and all(isinstance(name, str) for name in setting)
    return ','.join(setting) if names else repr(setting)


def _epoch_of(line: bytes) -> int:
    """Returns the epoch of a line of history.jsonl; 0 for a line that is damaged or cut off."""
    try:
        epoch = json.loads(line)['epoch'] if line.endswith(b'\n') else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return epoch if type(epoch) is int else 0


def verify_zip(path: str) -> None:
    """Verifies the checksums of a zip file; raises ValueError or an error of zipfile when the file is damaged.

    Has to be called before an array is read. The header of an array says how much of it is read, and zip compares the
    checksum only at the end of a member: an altered header would keep the reader from ever getting there.
    """
    with zipfile.ZipFile(path) as file:
        # Nothing in it is compressed, so it cannot unpack to more than its size.
        if sum(member.file_size for member in file.infolist()) > os.path.getsize(path):
            raise ValueError("its content claims to be larger than the file")
        damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its entry {damaged!r} is wrong")


def read_arrays(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (metadata, {name: array}) of an .npz that `write_arrays` wrote; raises ValueError when it is damaged.

    The file holds plain arrays: nothing in it is executed, and zip's checksum of each array is verified.
    """
    try:
        verify_zip(path)
        with np.load(path, allow_pickle=False) as arrays:
            state = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(array, np.ndarray) for array in state.values()):
            raise ValueError("one of its entries is not an array")
        return json.loads(state.pop(METADATA).tobytes()), state
    except Exception as error:         # zip, numpy and json fail in many ways on a damaged file
        raise ValueError(str(error) or type(error).__name__) from None


def write_arrays(file, metadata: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes {name: array}, and the metadata as JSON, to an open file as an .npz."""
    np.savez(file, **arrays, **{METADATA: np.frombuffer(json.dumps(metadata).encode(), 'uint8')})


def read_checkpoint(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (metadata, {name: array}) of a checkpoint.

    Raises ValueError when it is damaged, UserError when another version of this project wrote it.
    """
    metadata, state = read_arrays(path)
    if not isinstance(metadata, dict) or not {'settings', 'epoch', 'step', 'meter'} <= set(metadata):
        raise ValueError("its metadata are incomplete")
    version = str(metadata.get('version', '0.1'))
    if version.split('.')[:2] != utils.VERSION.split('.')[:2]:
        raise UserError(f"{path} was written by version {version[:20]} of this project, this is {utils.VERSION}: "
                        "finish the run with that version, or start again in another folder (--model_save_dir)")
    meter = metadata['meter']
    if not (set(metadata) == {'version', 'settings', 'epoch', 'step', 'meter'}
            and isinstance(metadata['settings'], dict) and isinstance(meter, dict) and set(meter) == set(vars(Meter()))
            and all(type(metadata[name]) is int and metadata[name] >= 0 for name in ('epoch', 'step'))
            and all(type(value) in (int, float) for value in meter.values())):
        raise ValueError("its metadata are not those of a checkpoint")
    return metadata, state


def read_weights(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (metadata, {name: array}) of a weight file that a training or a conversion wrote.

    metadata: {'genotype', 'init_channels', 'layers', 'class_num', 'image_size', 'dataset', 'class_names', 'mean',
    'std'}, of a supernet {'space', 'init_channels', 'layers', 'class_num'}, without the unknown ones.
    Raises UserError for any other file.
    """
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist: give the last.npz or best.npz of a training")
        metadata, weights = read_arrays(path)
        if not isinstance(metadata, dict) or 'settings' in metadata:
            raise ValueError("it is a checkpoint; the weights are in last.npz and best.npz in the same folder")
        for name in ('image_size', 'padding'):
            if type(metadata.get(name, 0)) is not int or not 0 <= metadata.get(name, 0) < 1 << 16:
                raise ValueError(f"its {name} is {str(metadata[name])[:50]}")
        return metadata, weights
    except ValueError as error:
        raise UserError(f"{path} holds no weights ({error}); weights of PyTorch are converted by "
                        "scripts/convert_weights.py") from None
