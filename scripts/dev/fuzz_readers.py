"""Gives damaged files to every reader, and counts the outcomes.

    python scripts/dev/fuzz_readers.py                             # 2000 inputs per reader
    python scripts/dev/fuzz_readers.py --count 10000 --seed 3 --only checkpoint

An input is a valid file with damage: bits flipped, bytes removed, inserted or moved, fields and numbers set to extreme
values. It may end in a UserError or ValueError with a message, in the result of the undamaged file ("equal"), or, where
the format has no checksum, in another well-formed result ("different"; "inside": the content is damaged and its
checksums are right, as in a file made with bad intentions). Everything else is a failure, with exit code 1: another
exception, a crash, more than 5 seconds of computation, more than 600 MB of memory, a wrong result. Child processes read
the files. The readers of PyTorch's files are left out when torch is not installed.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import gzip
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]

import numpy as np
from PIL import Image

import convert_weights
import genotypes
import imagenet_reader
import make_sample
import reader
import utils
from engine import checkpoint, console
from model import NetworkCIFAR
from model_search import Supernet
from operations import OPERATIONS
from utils import UserError

MAX_SECONDS, MAX_MEMORY = 5, 600           # of computation; MB: a WebP of imagenet_reader.MAX_PIXELS takes 540
INPUTS_PER_PROCESS = 200                   # Paddle keeps the memory of every network of a process
ADDRESS_SPACE = 4 << 30                    # bytes in addition to those at the start: protects the machine
OUTCOMES = ('errors', 'equal', 'different', 'failures')
TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}


class Subject(NamedTuple):
    """A reader and a valid file.

    read: returns the content of the file `path`, or raises UserError or ValueError; content: the bytes to damage;
    checksum: whether another result is a failure; pack: returns the file for damaged `content`.
    """
    name: str
    path: Path
    content: bytes
    read: Callable[[], Any]
    checksum: bool = False
    pack: Callable[[bytes], bytes] = bytes


NUMBERS = (b'0', b'-1', b'1', b'255', b'65536', b'2147483648', b'99999999999999999999', b'9' * 5000, b'1e999', b'NaN',
           b'null', b'[]', b'"x"', b'true')


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Returns `content` with damage of one of ten kinds, drawn from rng."""
    kind, size = rng.integers(10), len(content)

    def pick(choices):
        return choices[rng.integers(len(choices))]

    def position() -> int:
        # Headers are at the start or the end and a small part of most files: two draws in three are near an end.
        near = int(rng.integers(min(size, 600)))
        return pick((near, size - 1 - near, int(rng.integers(size))))

    if kind <= 2:                                                     # one bit, or several
        changed = bytearray(content)
        for _ in range((1, 1, rng.integers(2, 9))[kind]):
            changed[position()] ^= 1 << rng.integers(8)
        return bytes(changed)
    start, source, length, width = position(), position(), int(rng.integers(1, 40)), 1 << rng.integers(4)
    fields = (b'\xff' * width, bytes(width), b'\x7f' + b'\xff' * (width - 1), b'\xff' * (width - 1) + b'\x7f',
              b'\x80' + bytes(width - 1), rng.bytes(width))
    numbers = [match.span() for match in re.finditer(rb'-?[0-9.]+', content)] or [(start, start)]
    first, end, new = (
        (start, size, b''),                                           # the end is missing
        (start, start, rng.bytes(length)),                            # bytes inserted
        (start, start + length, b''),                                 # bytes removed
        (start, start + width, pick(fields)),                         # a field of 1 to 8 bytes
        (start, start + pick((0, length)), content[source:source + length]),      # bytes repeated elsewhere
        (start, start + 1, bytes([pick(b' \n\r\0",:[]{}\x1c\x85\\/')])),       # a byte with a meaning in text formats
        (*pick(numbers), pick(NUMBERS)))[kind - 3]                    # a number in a text
    return content[:first] + new + content[end:]


def examine(subject: Subject, count: int, seed: int, report: Callable[[str], None] = print) -> Counter:
    """Gives `count` damaged files to a reader, calls `report` with a line per failure, returns {outcome: number}."""
    subject.path.write_bytes(subject.pack(subject.content))
    expected, outcomes = comparable(subject.read()), []    # (outcome, reason of a failure) of every input so far
    while len(outcomes) < count:
        with tempfile.TemporaryFile('w+') as file:
            process = multiprocessing.get_context('fork').Process(
                target=_read_inputs, args=(subject, expected, seed, len(outcomes), count, file))
            process.start()
            process.join()
            file.seek(0)
            outcomes += map(json.loads, file)
        if process.exitcode:
            number = -process.exitcode                     # of the signal that ended the process
            outcomes.append(('failures', f"it took more than {MAX_SECONDS} s" if number in TIMERS.values() else
                             f"it crashed with {signal.Signals(number).name}" if number > 0 else
                             "it ended the process"))
    for number, (_, reason) in enumerate(outcomes):
        if reason:
            report(f"{subject.name}, input {number}: {reason[:300]!r}")
    subject.path.write_bytes(subject.pack(subject.content))        # another subject may read the same file
    return Counter(outcome for outcome, _ in outcomes)


def _read_inputs(subject: Subject, expected: Any, seed: int, first: int, count: int, file) -> None:
    """Reads the inputs from `first` on, in a child process; writes the outcomes to `file`, which outlives a crash."""
    gc.freeze()        # a child has no copy of the threads of Paddle's objects: their destruction would crash it
    # Free memory of the heap that this process has from its parent would hide what a reader takes.
    with contextlib.suppress(AttributeError, OSError):         # other systems than Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')          # the peak memory is the present one, proc(5)
    for stream in (1, 2):                                  # libraries in C write to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for number in range(first, min(first + INPUTS_PER_PROCESS, count)):
        rng = np.random.default_rng([seed, zlib.crc32(subject.name.encode()), number])
        subject.path.write_bytes(subject.pack(mutate(subject.content, rng)))
        memory = utils.peak_memory()
        # Seconds of computation: on a busy machine a process that waits for the processor does not hang.
        for timer, seconds in zip(TIMERS, (MAX_SECONDS, 60 * MAX_SECONDS)):
            signal.setitimer(timer, seconds)
        outcome, reason = _outcome(subject, expected)
        growth = 1000 * (utils.peak_memory() - memory)
        if growth > MAX_MEMORY:
            outcome, reason = 'failures', f"it took {growth:.0f} MB"
        file.write(json.dumps([outcome, reason]) + '\n')
        file.flush()


def comparable(value: Any) -> str:
    """Returns a value as JSON, with the dtype, the shape and the bytes of every array."""
    return json.dumps(value, default=lambda array: (array.dtype.str, array.shape, array.tobytes().hex()))


def _outcome(subject: Subject, expected: Any) -> tuple[str, str | None]:
    """Reads the file; returns the outcome, and the reason of a failure."""
    try:
        value = comparable(subject.read())
    except Exception as error:
        if type(error) not in (UserError, ValueError):     # subclasses, like UnicodeDecodeError, are unintended
            return 'failures', f"{type(error).__name__}: {error}"
        return ('errors', None) if str(error) else ('failures', "an error without a message")
    if value == expected:
        return 'equal', None
    return ('failures', "a wrong result") if subject.checksum else ('different', None)


# ---------------------------------------------------------------------------------------------------
# The readers

def zip_again(members: list[tuple[str, bytes]], damaged: bytes) -> bytes:
    """Returns a zip file of `members` (name, content), where `damaged` replaces the contents in a row."""
    # Inserted or removed bytes change the length of the first damaged member: those that follow are kept intact.
    packed, start, growth = io.BytesIO(), 0, len(damaged) - sum(len(content) for _, content in members)
    with zipfile.ZipFile(packed, 'w') as file:
        for name, content in members:
            end = start + len(content)
            if damaged[start:end] != content:
                end, growth = max(start, end + growth), 0
            file.writestr(name, damaged[start:end])
            start = end
    return packed.getvalue()


def npz_subjects(folder: Path) -> Iterator[Subject]:
    """Yields checkpoints, weights of a discrete network and of a supernet."""
    supernet, path = Supernet(2, 3, 3, build_programs=False), folder / 'x.npz'
    state = {name: supernet.store.get(name) for name in ('theta', 'alphas')}
    settings = {'init_channels': 2, 'class_num': 3, 'layers': 3, 'seed': 0, **supernet.space.as_dict()}
    metadata = {'version': utils.VERSION, 'settings': settings,
                'epoch': 1, 'step': 2, 'meter': vars(checkpoint.Meter(1.5, 2, 3, 4, 5.0))}
    weights = NetworkCIFAR(genotypes.DARTS_V2, 2, 3, 3, auxiliary=0.4, build_programs=False).weights()
    of_weights = {'genotype': genotypes.DARTS_V2._asdict(), 'dataset': 'x', 'class_names': ['a', 'b', 'c'],
                  'mean': [0.5] * 3, 'std': [0.25] * 3}
    velocity = np.random.default_rng(0).normal(size=3000)

    def read_checkpoint():
        metadata, state = checkpoint.read_checkpoint(path)
        assert isinstance(metadata['settings'], dict) and type(metadata['step']) is int
        meter = checkpoint.Meter(**metadata['meter'])
        if meter.images:
            meter.means('train')
        return metadata, state

    def read_weights():
        metadata, weights = checkpoint.read_weights(path)
        genotype = genotypes.of_weights(path, metadata, known=OPERATIONS)
        return metadata, convert_weights.check_discrete(genotype, weights)

    def read_supernet():
        space, partial_channels, weights = convert_weights.read_supernet(path)
        weights = convert_weights.check_supernet(weights, space, partial_channels)
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in weights.values())
        return weights

    for name, read, *content in (
            ('checkpoint', read_checkpoint, metadata, dict(state, velocity=velocity, adam_steps=np.array(3))),
            ('weights', read_weights, of_weights, weights),
            ('checkpoint of a supernet', read_supernet, metadata, state)):
        file = io.BytesIO()
        checkpoint.write_arrays(file, *content)
        yield Subject(f'{name} (.npz)', path, file.getvalue(), read, checksum=True)
        with zipfile.ZipFile(file) as archive:
            members = [(member, archive.read(member)) for member in archive.namelist()]
        yield Subject(f'{name} (.npz), inside', path, b''.join(content for _, content in members), read,
                      pack=partial(zip_again, members))


def torch_subjects(folder: Path) -> Iterator[Subject]:
    """Yields state dicts of PyTorch; none without torch."""
    if not importlib.util.find_spec('torch'):
        return
    import torch
    path, network = folder / 'x.pt', NetworkCIFAR(genotypes.DARTS_V2, 2, 3, 3, build_programs=False)
    tensors = {name: torch.from_numpy(array) for name, array in network.weights().items()}

    def read():
        found = convert_weights.from_state_dict(convert_weights.read_state_dict(path))
        return convert_weights.check_discrete(genotypes.DARTS_V2, found)

    for name, new in (('state dict of PyTorch (.pt)', True), ('state dict of PyTorch, old format', False)):
        file = io.BytesIO()
        torch.save(tensors, file, _use_new_zipfile_serialization=new)
        yield Subject(name, path, file.getvalue(), read, checksum=new)


def text_subjects(folder: Path) -> Iterator[Subject]:
    """Yields genotype.json, history.jsonl and a list of ImageNet."""
    path = folder / 'genotype.json'

    def read_genotype():
        genotype = genotypes.load(path, OPERATIONS)
        assert genotypes.check(json.loads(genotypes.dumps(genotype))) == genotype
        return genotype

    text = f'epoch 3: genotype = {genotypes.DARTS_V2}\n'.replace('(2, 3, 4, 5)', 'range(2, 6)')
    yield Subject('genotype.json', path, genotypes.dumps(genotypes.DARTS_V2).encode(), read_genotype)
    yield Subject('genotype as text', path, text.encode(), read_genotype)

    run = checkpoint.Run(argparse.Namespace(model_save_dir=str(folder / 'run'), resume=False, visualdl=None))
    console.log.setLevel(logging.ERROR)                        # hides the warnings about damage
    run.save({'theta': np.arange(3.0)}, 2, 1, checkpoint.Meter())
    task = mock.Mock(**{'store.state.return_value': {'theta': np.zeros(3)}})

    def resume():
        assert run.restore(task)[:2] == (2, 1)
        lines = run.history()
        assert all(0 < line['epoch'] <= 2 for line in lines)
        return lines

    lines = [json.dumps({'epoch': epoch, 'lr': 0.025, 'train_loss': 2.25}) + '\n' for epoch in (1, 2, 3)]
    yield Subject('history.jsonl', Path(run.path('history.jsonl')), ''.join(lines).encode(), resume)

    names = [f'train/n{k % 3:08d}/n{k % 3:08d}_{k}.JPEG' for k in range(30)]
    content = ''.join(f'{name} {k % 3}\n' for k, name in enumerate(names)).encode()
    (folder / 'val_list.txt').write_bytes(content)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    def read_lists():
        data = imagenet_reader.load(folder, 3)
        assert len(data.train.paths) == len(data.train.labels) and set(data.train.labels) <= {0, 1, 2}
        assert all(os.path.exists(path) for path in data.train.paths)          # 1 % of 30 is less than one
        return data.train.paths, data.train.labels, data.class_names

    yield Subject('list of ImageNet', folder / 'train_list.txt', content, read_lists)


def idx_subjects(folder: Path) -> Iterator[Subject]:
    """Yields the files of Fashion-MNIST, compressed and uncompressed."""
    def read(data_dir: Path):
        data = reader.load('fashion_mnist', data_dir)
        for x, y in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
            assert x.dtype == np.uint8 and x.shape == (len(y), 3, data.image_size, data.image_size)
            assert y.dtype == np.int64 and set(y) <= set(range(data.class_num))
        return data[2:7]

    for suffix in ('.gz', ''):
        data_dir = folder / f'idx{suffix}'
        make_sample.make(reader.default_folder('fashion_mnist_sample'), data_dir, train=1, test=1)
        for path in [] if suffix else list(data_dir.iterdir()):
            path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        for path in sorted(data_dir.glob('train-*')):
            yield Subject(f'Fashion-MNIST: {path.name}', path, path.read_bytes(), partial(read, data_dir), bool(suffix))


def custom_subjects(folder: Path) -> Iterator[Subject]:
    """Yields an .npz of custom data, also with right checksums, and descriptions of folders of images."""
    path, rng = folder / 'custom.npz', np.random.default_rng(0)
    arrays = dict(train_images=rng.integers(0, 256, (6, 8, 8, 3), 'uint8'), train_labels=np.arange(6) % 3,
                  test_images=rng.integers(0, 256, (3, 8, 8, 3), 'uint8'), test_labels=np.arange(3),
                  class_names=np.array(['a', 'bc', 'd']))
    file = io.BytesIO()
    np.savez(file, **arrays)

    def read_npz():
        data = reader.load('npz', str(path))
        for x, y in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
            assert x.dtype == np.uint8 and x.shape == (len(y), 3, data.image_size, data.image_size)
            assert y.dtype == np.int64 and set(y) <= set(range(data.class_num))
        assert np.isfinite([data.mean, 1 / data.std]).all() and len(data.class_names) == data.class_num
        return data[1:9]

    yield Subject('custom arrays (.npz)', path, file.getvalue(), read_npz, checksum=True)
    with zipfile.ZipFile(file) as archive:
        members = [(member, archive.read(member)) for member in archive.namelist()]
    yield Subject('custom arrays (.npz), inside', path, b''.join(content for _, content in members), read_npz,
                  pack=partial(zip_again, members))

    pixels, description = io.BytesIO(), folder / 'description.txt'
    Image.new('L', (9, 8), 99).save(pixels, 'PNG')

    def read_folders():
        """Makes the folder of a description, which has a path per line, and loads it."""
        with tempfile.TemporaryDirectory() as root:
            for line in description.read_bytes().splitlines():
                parts = [part for part in line.split(b'/') if part.strip(b'.') and len(part) < 99 and b'\0' not in part]
                with contextlib.suppress(OSError):             # a file that is the folder of another one
                    place = os.path.join(os.fsencode(root), *parts)
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    if line.endswith(b'/'):
                        os.makedirs(place, exist_ok=True)
                    else:
                        with open(place, 'wb') as image:
                            image.write(pixels.getvalue() if len(line) % 7 else b'no image')
            data = reader.load('folder', root, 8)
            assert len(data.train_images) + len(data.test_images) > 1 and (data.train_images == 99).all()
            assert set(data.train_labels) == set(data.test_labels) == set(range(data.class_num))
            assert data.class_num == len(set(data.class_names)) > 1
            return data.class_names, data.train_labels, data.test_labels

    for name, halves in (('train and val', ('train/', 'val/')), ('class folders', ('',))):
        lines = [f'{half}{label}/{k}.png' for half in halves for label in ('cat', 'dog', '鸟')
                 for k in (1, 22, 333, 4444)]
        lines = [line + 'x' * (len(line.encode()) % 7 == 0) for line in lines]        # those are no image files
        yield Subject(f'folder: {name}', description, '\n'.join(lines).encode(), read_folders)


def image_subjects(folder: Path) -> Iterator[Subject]:
    """Yields image files of all formats that the installed Pillow can write."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), 'uint8')
    image = Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6                           # the orientation
    formats = {'PPM': {}, 'JPEG': dict(quality=80, exif=exif.tobytes()), 'JPEG progressive': dict(progressive=True),
               'PNG': {}, 'GIF': {}, 'BMP': {}, 'WEBP': {}, 'TIFF': {}, 'TIFF packed': dict(compression='tiff_lzw')}
    for name, settings in formats.items():
        content, path = io.BytesIO(), folder / f'{name}.JPEG'
        try:
            (image.convert('P') if name == 'GIF' else image).save(content, name.split()[0], **settings)
        except (KeyError, OSError):
            continue

        def read(path=str(path)):
            results = []
            for augment in (False, True):
                images, _, bad = imagenet_reader.make_batch([path], [0, 0], augment)
                assert images.shape == (len(images), 3, 224, 224) and images.dtype == np.uint8
                if bad:
                    raise ValueError(bad[path])
                results.append(images)
            return results

        yield Subject(f'image: {name}', path, content.getvalue(), read)


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=utils.number(int, 1), default=2000, help='inputs per reader (%(default)s)')
    parser.add_argument('--seed', type=utils.number(int, 0), default=0, help='seed of the damage (%(default)s)')
    parser.add_argument('--only', default='', metavar='TEXT', help='part of the names of the readers to examine (all)')
    args = parser.parse_args()
    began, sums = time.time(), Counter()
    row = '{:<42} {:>9} {:>9} {:>9} {:>9} {:>9}'.format
    print(row('reader', 'inputs', *OUTCOMES))
    with tempfile.TemporaryDirectory() as folder:
        for subjects in (npz_subjects, torch_subjects, text_subjects, idx_subjects, custom_subjects, image_subjects):
            for subject in subjects(Path(folder)):
                if args.only in subject.name:
                    counts = examine(subject, args.count, args.seed)
                    sums += counts
                    print(row(subject.name, args.count, *(counts[outcome] for outcome in OUTCOMES)), flush=True)
    if not sums:
        raise UserError(f"--only {args.only}: no reader has that in its name")
    print(row('sum', sum(sums.values()), *(sums[outcome] for outcome in OUTCOMES)))
    print(f"{time.time() - began:.0f} s")
    sys.exit(1 if sums['failures'] else 0)


if __name__ == '__main__':
    utils.run(main)
