"""Gives each reader thousands of damaged files, and counts what it makes of them.

    python scripts/fuzz_readers.py                                 # 2000 inputs for each reader
    python scripts/fuzz_readers.py --count 10000 --seed 3 --only checkpoint

A valid file of each format is altered: bits flipped, cut off, bytes put in, taken out, repeated, fields and numbers set
to extreme values. An input may end in the error that the reader documents, or in a right result: where the format has
a checksum that is what the unaltered file holds, and where it has none a well-formed one ("different"). "inside" means
that the content was altered under right checksums, as somebody with bad intentions would. Everything else is a
failure, with exit code 1: another exception, a crash, more than 5 seconds of computing, more than 600 MB of memory, a
wrong array. The reading is done in processes of their own. What needs torch is left out without it.
"""
import argparse
import gzip
import io
import json
import logging
import mmap
import os
import re
import resource
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils

import numpy as np
from PIL import Image

import convert_weights
import genotypes
import imagenet_reader
import reader
from engine import checkpoint, console
from model import NetworkCIFAR
from model_search import Supernet
from utils import UserError

MOST_SECONDS, MOST_MEMORY = 5, 600         # MB; a WebP of imagenet_reader.MOST_PIXELS takes 540
BLOCK = 200                                # inputs of a process: Paddle keeps what every network of it has held
ADDRESS_SPACE = 4 << 30                    # bytes beyond what the process has: protects the machine from a failure

Subject = namedtuple('Subject', 'name path content read checksum pack')
Subject.__doc__ = """A reader and a valid file: read() reads the file `path`, raises UserError or ValueError, and
returns something that == compares; content: bytes to be altered; checksum: whether an altered result is a failure;
pack: makes the content of the file out of `content`."""
Result = namedtuple('Result', 'inputs errors equal different failures')


# ---------------------------------------------------------------------------------------------------
# Damage

NUMBERS = (b'0', b'-1', b'1', b'255', b'65536', b'2147483648', b'99999999999999999999', b'9' * 5000, b'1e999', b'NaN',
           b'null', b'[]', b'"x"', b'true')


def mutate(content, rng):
    """`content` with some damage out of a dozen kinds, drawn from rng."""
    changed = bytearray(content)
    kind, size = rng.integers(10), len(content)

    def place():
        # Headers, which stand at either end, are a small part of most files.
        near = int(rng.integers(min(size, 600)))
        return (near, size - 1 - near, int(rng.integers(size)))[rng.integers(3)]

    if kind <= 2:
        for _ in range((1, 1, rng.integers(2, 9))[kind]):
            changed[place()] ^= 1 << rng.integers(8)
    elif kind == 3:
        del changed[place():]
    elif kind == 4:
        at = place()
        changed[at:at] = rng.bytes(rng.integers(1, 40))
    elif kind == 5:
        at = place()
        del changed[at:at + rng.integers(1, 40)]
    elif kind == 6:                                                   # a field of 1 to 8 bytes
        at, length = place(), 1 << rng.integers(4)
        fields = (b'\xff' * length, bytes(length), b'\x7f' + b'\xff' * (length - 1), b'\xff' * (length - 1) + b'\x7f',
                  b'\x80' + bytes(length - 1), rng.bytes(length))
        changed[at:at + length] = fields[rng.integers(len(fields))]
    elif kind == 7:                                                   # repeated, or moved elsewhere
        at, length = place(), int(rng.integers(1, 200))
        to = place()
        changed[to:to + length * rng.integers(2)] = content[at:at + length]
    elif kind == 8:                                                   # a byte in hiding that means something in text
        changed[place()] = b' \n\r\0",:[]{}\x1c\x85\\/'[rng.integers(15)]
    else:                                                             # a number in text
        found = [match.span() for match in re.finditer(rb'-?[0-9.]+', content)]
        first, last = found[rng.integers(len(found))] if found else (place(),) * 2
        changed[first:last] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(changed)


# ---------------------------------------------------------------------------------------------------
# One reader

def _classify(read, expected, checksum):
    """-> the field of Result that an input belongs to, and what failed."""
    try:
        value = read()
    except (UserError, ValueError) as error:
        if type(error) not in (UserError, ValueError):                # a UnicodeDecodeError is not meant by it
            return 'failures', f"{type(error).__name__}: {error}"
        return ('errors', None) if str(error) else ('failures', "an error without a message")
    except Exception as error:
        return 'failures', f"{type(error).__name__}: {error}"
    if value == expected:
        return 'equal', None
    return ('failures', "a wrong result") if checksum else ('different', None)


def _child(subject, expected, seed, first, count, shared, failures):
    """Reads a block of inputs from `first` on; counts in `shared`, which outlives a crash."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)                        # of libraries in C
    with open('/proc/self/statm') as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    memory = utils.peak_memory()
    for number in range(first, min(first + BLOCK, count)):
        shared[0] = number
        rng = np.random.default_rng([seed, zlib.crc32(subject.name.encode()), number])
        _write(subject, mutate(subject.content, rng))
        # Of computing; who waits for the processor, on a busy machine, does not hang.
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 60 * MOST_SECONDS)
        field, reason = _classify(subject.read, expected, subject.checksum)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown, memory = 1000 * (utils.peak_memory() - memory), utils.peak_memory()
        if grown > MOST_MEMORY:
            field, reason = 'failures', f"it took {grown:.0f} MB"
        shared[1 + Result._fields[1:].index(field)] += 1
        if reason:
            failures.write(f"input {number}: {reason[:300]!r}\n")
            failures.flush()
    shared[0] += 1


def _write(subject, content):
    with open(subject.path, 'wb') as file:
        file.write(subject.pack(content))


def examine(subject, count, seed, say=print):
    """-> Result of `count` inputs; says what each failure is."""
    _write(subject, subject.content)
    expected = subject.read()
    shared = np.frombuffer(mmap.mmap(-1, 8 * 5), 'int64')             # the input's number; then the counts
    with tempfile.TemporaryFile('w+') as failures:
        while shared[0] < count:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                code = 1
                try:
                    _child(subject, expected, seed, int(shared[0]), count, shared, failures)
                    code = 0
                finally:
                    os._exit(code)
            status = os.waitpid(child, 0)[1]
            if not status:
                continue
            code = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            reason = ("it hung" if code in (signal.SIGALRM, signal.SIGPROF) else
                      f"it crashed with {signal.Signals(code).name}" if code else "it ended the process")
            failures.write(f"input {shared[0]}: {reason}\n")
            failures.flush()                   # or the next process would write it too
            shared[4] += 1
            shared[0] += 1
        failures.seek(0)
        for line in failures:
            say(f"{subject.name}, {line.rstrip()}")
    _write(subject, subject.content)           # other readers read it too
    return Result(count, *(int(each) for each in shared[1:]))


# ---------------------------------------------------------------------------------------------------
# The readers

def comparable(value):
    """A value with arrays as something that == compares."""
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def as_is(content):
    return content


def npz(about, arrays):
    file = io.BytesIO()
    checkpoint.write_arrays(file, about, arrays)
    return file.getvalue()


def inside_zip(original):
    """-> (content, pack): the members of a zip one after the other, to be altered under right checksums."""
    with zipfile.ZipFile(io.BytesIO(original)) as file:
        members = [(member.filename, file.read(member)) for member in file.infolist()]

    def pack(content):
        packed, at = io.BytesIO(), 0
        with zipfile.ZipFile(packed, 'w') as file:
            for number, (name, member) in enumerate(members):
                # What was put in or taken out shifts all that follow: most of them should stay whole.
                end = at + len(member) if number < len(members) - 1 else len(content)
                if content[at:end] != member and content[len(content) - (total - at - len(member)):] == b''.join(
                        each for _, each in members[number + 1:]):
                    end = len(content) - (total - at - len(member))
                file.writestr(name, content[at:end])
                at = end
        return packed.getvalue()

    total = sum(len(member) for _, member in members)
    return b''.join(member for _, member in members), pack


def npz_subjects(folder):
    """Checkpoints, weights of a discrete network and of a supernet."""
    rng = np.random.default_rng(0)
    supernet, path = Supernet(2, 3, 3, build_programs=False), os.path.join(folder, 'x.npz')
    names = ('theta', 'alphas')
    state = {name: supernet.store.get(name) for name in names}
    about = {'settings': {'init_channels': 2, 'class_num': 3, 'layers': 3, 'seed': 0}, 'epoch': 1, 'step': 2,
             'meter': vars(checkpoint.Meter(1.5, 2, 3, 4, 5.0))}
    network = NetworkCIFAR(genotypes.DARTS_V2, 2, 3, 3, auxiliary=0.4, build_programs=False)
    weights = {'genotype': genotypes.DARTS_V2._asdict(), 'dataset': 'x', 'class_names': ['a', 'b', 'c'],
               'mean': [0.5] * 3, 'std': [0.25] * 3}
    content = npz(about, dict(state, velocity=rng.normal(size=3000), adam_steps=np.array(3)))

    def read_checkpoint():
        about, state = checkpoint.read_checkpoint(path)
        assert isinstance(about['settings'], dict) and type(about['step']) is int
        checkpoint.Meter(**about['meter']).means('train') if about['meter']['images'] else None
        return comparable([about, state])

    def read_weights():
        about, weights = checkpoint.read_weights(path)
        genotype = genotypes.of_weights(path, about)
        return comparable([about, convert_weights.check_discrete(genotype, weights)])

    def read_supernet():
        weights = convert_weights.check_supernet(convert_weights.read_supernet(path))
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in weights.values())
        return comparable(weights)

    for name, original, read in (('checkpoint', content, read_checkpoint),
                                 ('weights', npz(weights, network.weights()), read_weights),
                                 ('checkpoint of a supernet', npz(about, state), read_supernet)):
        yield Subject(f'{name} (.npz)', path, original, read, True, as_is)
        content, pack = inside_zip(original)
        yield Subject(f'{name} (.npz), inside', path, content, read, False, pack)


def torch_subjects(folder):
    """State dicts of PyTorch; none without torch."""
    try:
        torch = convert_weights.import_torch()
    except UserError:
        return
    path = os.path.join(folder, 'x.pt')
    weights = {name: torch.from_numpy(array) for name, array in NetworkCIFAR(
        genotypes.DARTS_V2, 2, 3, 3, auxiliary=0.0, build_programs=False).weights().items()}

    def read():
        return comparable(convert_weights.check_discrete(
            genotypes.DARTS_V2, convert_weights.from_state_dict(convert_weights.read_state_dict(path))))

    for name, new in (('state dict of PyTorch (.pt)', True), ('state dict of PyTorch, old format', False)):
        file = io.BytesIO()
        torch.save(weights, file, _use_new_zipfile_serialization=new)
        yield Subject(name, path, file.getvalue(), read, new, as_is)


def text_subjects(folder):
    """genotype.json, history.jsonl and ImageNet's lists."""
    path = os.path.join(folder, 'genotype.json')

    def read_genotype():
        genotype = genotypes.load(path)
        assert genotypes.check(json.loads(genotypes.dumps(genotype))) == genotype
        return genotype

    yield Subject('genotype.json', path, genotypes.dumps(genotypes.DARTS_V2).encode(), read_genotype, False, as_is)

    run_folder = os.path.join(folder, 'run')
    run = checkpoint.Run(argparse.Namespace(model_save_dir=run_folder, resume=False, visualdl=None))
    console.log.handlers = [logging.NullHandler()]             # it warns of what is damaged
    run.save({'theta': np.arange(3.0)}, 2, 1, checkpoint.Meter())
    history = os.path.join(run_folder, 'history.jsonl')
    task = argparse.Namespace(state=lambda: {'theta': np.zeros(3)}, load_state=lambda state: None)

    def resume():
        assert run.restore(task)[:2] == (2, 1)
        with open(history, 'rb') as file:
            lines = file.read().split(b'\n')
        assert lines.pop() == b'' and all(0 < json.loads(line)['epoch'] <= 2 for line in lines)
        return lines

    lines = [json.dumps({'epoch': epoch, 'lr': 0.025, 'train_loss': 2.25}) + '\n' for epoch in (1, 2, 3)]
    yield Subject('history.jsonl', history, ''.join(lines).encode(), resume, False, as_is)

    lists = os.path.join(folder, 'lists')
    os.makedirs(lists)
    content = ''.join(f'train/n{k % 3:08d}/n{k % 3:08d}_{k}.JPEG {k % 3}\n' for k in range(30)).encode()
    with open(os.path.join(lists, 'val_list.txt'), 'wb') as file:
        file.write(content)

    def read_lists():
        data = imagenet_reader.load(lists, 3)
        assert len(data.train.paths) == len(data.train.labels) and set(data.train.labels) <= {0, 1, 2}
        assert all(path.startswith((lists, '/')) for path in data.train.paths)
        return comparable([data.train.paths, data.train.labels, data.class_names])

    yield Subject('list of ImageNet', os.path.join(lists, 'train_list.txt'), content, read_lists, False, as_is)


def read_dataset(name, folder):
    """A data set as something comparable, once it is certain that it is well-formed."""
    data = reader.load(name, folder)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == np.uint8 and images.shape == (len(labels), 3, 32, 32)
        assert labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < 10
    assert len(data.class_names) == 10 and all(isinstance(each, str) for each in data.class_names)
    return comparable(data[2:7])


def idx_subjects(folder):
    """Files of Fashion-MNIST, packed and not."""
    rng = np.random.default_rng(0)
    arrays = {'images-idx3-ubyte': rng.integers(0, 256, (3, 28, 28), 'uint8'),
              'labels-idx1-ubyte': np.array([1, 5, 9], 'uint8')}
    for packed in (True, False):
        where = os.path.join(folder, f'idx{packed}')
        os.makedirs(where)
        files = {}
        for half in ('train', 't10k'):
            for name, array in arrays.items():
                raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()
                path = os.path.join(where, f'{half}-{name}' + '.gz' * packed)
                files[path] = gzip.compress(raw, mtime=0) if packed else raw
                with open(path, 'wb') as file:
                    file.write(files[path])
        for name in arrays:
            path = os.path.join(where, f'train-{name}' + '.gz' * packed)
            yield Subject(f'Fashion-MNIST: {os.path.basename(path)}', path, files[path],
                          lambda where=where: read_dataset('fashion_mnist', where), packed, as_is)


def picture_subjects(folder):
    """Picture files of all formats."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), 'uint8')
    image = Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {'JPEG': dict(quality=80, exif=exif.tobytes()), 'JPEG progressive': dict(progressive=True),
             'PNG': {}, 'GIF': {}, 'BMP': {}, 'WEBP': {}, 'TIFF': {}, 'TIFF packed': dict(compression='tiff_lzw')}
    for form, settings in forms.items():
        content, path = io.BytesIO(), os.path.join(folder, f'{form}.JPEG')
        try:
            (image.convert('P') if form == 'GIF' else image).save(content, form.split()[0], **settings)
        except (KeyError, OSError):
            continue                           # this Pillow was built without it

        def read(path=path):
            result = []
            for augment in (False, True):
                try:
                    images, _, bad = imagenet_reader.make_batch([path], [0, 0], augment)
                except UserError:              # in the training it is one unless another picture takes its place
                    continue
                assert images.shape == (len(images), 3, 224, 224) and images.dtype == np.uint8
                if bad:
                    raise ValueError(bad[path])
                result.append(comparable(images))
            return result

        yield Subject(f'picture: {form}', path, content.getvalue(), read, False, as_is)


def subjects(folder):
    for make in (npz_subjects, torch_subjects, text_subjects, idx_subjects, picture_subjects):
        yield from make(folder)


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--count', type=utils.number(int, 1), default=2000, help='inputs for each reader (%(default)s)')
    add('--seed', type=utils.number(int, 0), default=0, help='of the damage (%(default)s)')
    add('--only', default='', metavar='TEXT', help='the readers whose name holds the text')
    args = parser.parse_args()
    began, totals = time.time(), np.zeros(5, int)
    print(f"{'reader':<40} {'inputs':>8} {'errors':>8} {'equal':>8} {'different':>10} {'failures':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(folder):
            if args.only not in subject.name:
                continue
            result = examine(subject, args.count, args.seed)
            totals += result
            different = '-' if subject.checksum else result.different
            print(f"{subject.name:<40} {result.inputs:>8} {result.errors:>8} {result.equal:>8} {different:>10} "
                  f"{result.failures:>9}", flush=True)
    if not totals[0]:
        raise UserError(f"--only {args.only}: no reader has that in its name")
    print("{:<40} {:>8} {:>8} {:>8} {:>10} {:>9}".format('together', *totals))
    print(f"{time.time() - began:.0f} s")
    sys.exit(1 if totals[-1] else 0)


if __name__ == '__main__':
    utils.run(main)
