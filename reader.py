"""Data sets and batches.

A data set is one array of bytes in memory; a batch is cut out of it, augmented and normalised by array
operations on the whole batch. Everything random is drawn from (seed, epoch, step), so that a batch does
not depend on what was drawn before it: any number of workers may prepare batches, and a resumed run
continues with the very images that would have come next.
"""
import contextlib
import gzip
import hashlib
import io
import logging
import math
import os
import pickletools
import posixpath
import re
import struct
import tarfile
import threading
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from utils import UserError, boolean, number

log = logging.getLogger('darts')

Dataset = namedtuple('Dataset', 'name class_num class_names train_images train_labels '
                                'test_images test_labels mean std')
Dataset.__doc__ = """images: uint8 [N, 3, 32, 32]; labels: int64 [N]; class_names: a text for each label;
mean, std: float32 [3], of pixels in 0..1."""

Cifar = namedtuple('Cifar', 'folder url md5 train test labels meta label_names class_names mean std')
Idx = namedtuple('Idx', 'url md5 class_names mean std')

_BCE = 'https://dataset.bj.bcebos.com/'
_CIFAR10 = 'airplane automobile bird cat deer dog frog horse ship truck'
_CIFAR100 = '''
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
    palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
    sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm'''
_FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
            'Ankle boot')
_IDX_FILES = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
              't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')

DATASETS = {
    'cifar10': Cifar(
        'cifar-10-batches-py', _BCE + 'cifar/cifar-10-python.tar.gz', 'c58f30108f718f92721af3b95e74349a',
        tuple(f'data_batch_{i}' for i in range(1, 6)), ('test_batch',), 'labels',
        'batches.meta', 'label_names', tuple(_CIFAR10.split()),
        (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    'cifar100': Cifar(
        'cifar-100-python', _BCE + 'cifar/cifar-100-python.tar.gz', 'eb9058c3a382ffc7106e4002c42a8d85',
        ('train',), ('test',), 'fine_labels',
        'meta', 'fine_label_names', tuple(_CIFAR100.split()),
        (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    'fashion_mnist': Idx(
        _BCE + 'fashion_mnist/',
        ('8d4fb7e6c68d591d4c3dfef9ec88bf0d', '25c81989df183df01b3e8a0aad5dffbe',
         'bef4ecab320f06d8554ea6380940ec79', 'bb300cfdad3c16e7a12a480ee83cd310'),
        _FASHION, (0.2860,) * 3, (0.3530,) * 3),
    # Part of the repository (scripts/make_sample.py): there is nothing to download.
    'fashion_mnist_sample': Idx(None, None, _FASHION, (0.2860,) * 3, (0.3530,) * 3),
}

IMAGE_SIZE = 32
IDX_PADDING = 2                  # of the images of 28 x 28 in MNIST's format


def add_arguments(parser):
    """The flags of every script that reads one of DATASETS."""
    add = parser.add_argument
    add('--dataset', default='cifar10', choices=sorted(DATASETS), help='(%(default)s)')
    add('--data', default=None, help='folder of the data set (dataset/<its name>); downloaded there if missing')
    add('--cutout', type=boolean, default=True, help='blank a random square of each image (%(default)s)')
    add('--cutout_length', type=number(int, 1), default=16, help='side of the square (%(default)s)')


# More is no data set but a trap: CIFAR unpacks to 186 MB, with 0.2 million opcodes in its largest pickle.
LARGEST_FILE = 1 << 29           # bytes unpacked
LARGEST_PICKLE = 1 << 21         # opcodes
LARGEST_TAR = 1000               # members


def default_folder(name):
    """Where a data set is looked for: dataset/<name>, beside this file if it is part of the repository."""
    folder = os.path.join('dataset', name)
    if name == 'fashion_mnist_sample':
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), folder)
    return folder


def load(name, data_dir=None):
    """The Dataset `name` of DATASETS from the folder data_dir (default_folder(name)).

    CIFAR: its archive, or what it unpacks to. Fashion-MNIST: the four original files, gzipped or not.
    What is missing is downloaded there. Raises UserError for an unknown name and for files that are
    missing and cannot be downloaded, cut off, altered or no such data set.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    source, data_dir = DATASETS[name], data_dir or default_folder(name)
    class_names, halves = (_load_cifar if isinstance(source, Cifar) else _load_idx)(source, data_dir)
    return Dataset(name, len(class_names), class_names, *halves,
                   np.array(source.mean, 'float32'), np.array(source.std, 'float32'))


# ---------------------------------------------------------------------------------------------------
# Files

def _damaged(path, reason):
    # The reason may quote the file.
    reason = ''.join(c if c.isprintable() else '?' for c in str(reason)[:200]) or type(reason).__name__
    return UserError(f"{path} is damaged or not what it should be ({reason}): "
                     "delete it and run again to download it, or copy it anew")


def _download(files, folder):
    """Downloads {url: md5} into folder through Paddle's downloader, which verifies the checksums."""
    from paddle.utils import download
    paths = {url: os.path.join(folder, os.path.basename(url)) for url in files}
    with _listening_to(download.logger, logging.getLogger('httpx')) as said:
        for url, md5 in files.items():
            log.info(f"downloading {url} to {folder}")
            try:
                download.get_path_from_url(url, folder, md5sum=md5, decompress=False)
            except Exception as error:         # whatever the network and the file system have to say
                # The downloader tells its log why, and its caller only that it gave up.
                why = re.findall('failed with exception (.+)|(md5 check failed)', '\n'.join(said))
                reason = ''.join(why[-1]) if why else error
                if reason == 'md5 check failed' and os.path.isfile(paths[url]):
                    os.remove(paths[url])      # or the next run would take it for an archive of the user's
                missing = [url for url in files if not os.path.isfile(paths[url])]
                names = [os.path.basename(url) for url in missing]
                be, them = ('are', 'them') if len(missing) > 1 else ('is', 'it')
                raise UserError(
                    f"{', '.join(names)} {be} not in {folder} and could not be downloaded ({reason}): "
                    f"get {them} from {' '.join(missing)} and put {them} there") from None


@contextlib.contextmanager
def _listening_to(*loggers):
    """Keeps what loggers say from the console, and hands it out as a list."""
    said, handler = [], logging.Handler()
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    handler.emit = lambda record: said.append(record.getMessage())
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        yield said
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _read(path):
    """The content of a file, unpacked if it is a .gz; reading to the end verifies gzip's checksum."""
    try:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
            content = file.read(LARGEST_FILE + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > LARGEST_FILE:
        raise _damaged(path, f"it has more than {LARGEST_FILE} bytes")
    return content


def _note_other_packing(folder, md5s):
    """Says which of the files {name: md5} are not the published ones, byte for byte: users pack them anew."""
    others = []
    for name, md5 in md5s.items():
        digest = hashlib.md5()
        with open(os.path.join(folder, name), 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        if digest.hexdigest() != md5:
            others.append(name)
    if others:
        log.warning(f"{folder}: {', '.join(others)} without the published checksum (packed anew or altered); "
                    "used as found")


# ---------------------------------------------------------------------------------------------------
# CIFAR: a tar of pickles

def _load_cifar(source, folder):
    archive = os.path.join(folder, os.path.basename(source.url))
    unpacked = [path for path in (os.path.join(folder, source.folder), folder)
                if any(os.path.isfile(os.path.join(path, name)) for name in source.train + source.test)]
    if not os.path.isfile(archive) and unpacked:
        read = _folder_reader(unpacked[0])
    else:
        if not os.path.isfile(archive):
            _download({source.url: source.md5}, folder)
        read = _tar_reader(archive, source.folder)
    halves = []
    for names in (source.train, source.test):
        parts = [_cifar_batch(*read(name), source.labels, len(source.class_names)) for name in names]
        halves += [np.concatenate(arrays) for arrays in zip(*parts)]
    class_names = _cifar_names(*read(source.meta), source)
    if os.path.isfile(archive):
        _note_other_packing(folder, {os.path.basename(archive): source.md5})
    return class_names, halves


def _folder_reader(folder):
    """A function name -> (where, content) for the files of an unpacked archive; None if missing."""
    def read(name):
        path = os.path.join(folder, name)
        return path, _read(path) if os.path.isfile(path) else None
    return read


def _tar_reader(path, folder):
    """The same for the files in `folder` of a .tar.gz; nothing is unpacked to the disk."""
    content, parts = _read(path), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode='r:') as tar:
            for count, member in enumerate(tar):
                # The content is taken where it stands: a sparse member could claim any size.
                if member.isreg() and not member.issparse():
                    end = member.offset_data + member.size
                    parts[posixpath.normpath(member.name)] = slice(member.offset_data, end)
                if count > LARGEST_TAR:
                    raise tarfile.TarError(f"it has more than {LARGEST_TAR} members")
    except Exception as error:         # tarfile lets errors of many kinds through
        raise _damaged(path, error) from None

    def read(name):
        part = parts.get(f'{folder}/{name}')
        return f'{path}: {name}', None if part is None else content[part]
    return read


def _cifar_dict(content):
    batch = unpickle(content)
    if not isinstance(batch, dict):
        raise ValueError("it holds no dictionary")
    return {_text(key): value for key, value in batch.items()}


def _text(value):
    return value.decode('latin1') if isinstance(value, bytes) else value


def _cifar_batch(where, content, label_key, class_num):
    """-> (images uint8 [N, 3, 32, 32], labels int64 [N]) of one pickled batch."""
    if content is None:
        raise UserError(f"{where} is missing: the archive or folder that should hold it is incomplete; "
                        "delete that and run again to download it, or copy it anew")
    try:
        batch = _cifar_dict(content)
        missing = [key for key in ('data', label_key) if key not in batch]
        if missing:
            raise ValueError(f"{missing[0]!r} is not in it")
        images, labels = (_as_array(batch[key]) for key in ('data', label_key))
        if images.dtype != np.uint8 or images.shape[1:] != (3 * IMAGE_SIZE * IMAGE_SIZE,) or not len(images):
            raise ValueError("its data are not uint8 [N, 3072]")
        if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1]:
            raise ValueError("its labels are not a whole number for each image")
        if labels.min() < 0 or labels.max() >= class_num:
            raise ValueError(f"its labels are not in 0..{class_num - 1}")
    except Exception as error:         # a hostile pickle can fail in any way
        raise _damaged(where, error) from None
    return images.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), labels.astype('int64')


def _as_array(value):
    if isinstance(value, list) and all(type(item) is int for item in value):
        return np.array(value, 'int64')
    if not isinstance(value, _Array):
        raise ValueError("its data or labels are no array and no list of whole numbers")
    return value.array


def _cifar_names(where, content, source):
    """The class names of the archive's meta file, the known ones where there is no such file."""
    if content is None:
        return source.class_names
    try:
        names = _cifar_dict(content).get(source.label_names)
        if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
            raise ValueError(f"it has no list of names {source.label_names!r}")
        if len(names) != len(source.class_names):
            raise ValueError(f"it names {len(names)} classes, not {len(source.class_names)}")
    except Exception as error:
        raise _damaged(where, error) from None
    return tuple(_text(name) for name in names)


# ---------------------------------------------------------------------------------------------------
# Pickles

class UnpicklingError(ValueError):
    """A pickle is malformed or holds more than arrays and plain containers."""


class _Array:
    """The pickle of an array: what numpy writes of it. It becomes an array only when it is asked for."""

    def __init__(self, *parts):
        self.parts = parts

    def set_state(self, version, shape, dtype, fortran, raw):
        self.parts = raw, dtype, shape, 'F' if fortran else 'C'

    @property
    def array(self):
        return _array(*self.parts)


class _Dtype:
    """The pickle of a plain numeric dtype."""

    def __init__(self, name, *_):
        name = _text(name)
        if not re.fullmatch('[iu][1248]|f[248]|b1', name):
            raise UnpicklingError(f"dtype {name[:20]!r} is not admitted")
        self.name, self.order = name, '='

    def set_state(self, version, order, subarray, names, fields, *_):
        order = _text(order)
        if order not in ('<', '>', '=', '|') or subarray or names or fields:
            raise UnpicklingError("a structured dtype is not admitted")
        self.order = order


def _array(raw, dtype, shape, order, *_):
    """An array from its bytes, after a check of everything that numpy would trust."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (str, bytes, bytearray)):
        raise UnpicklingError("an array of objects is not admitted")
    if not isinstance(shape, tuple) or len(shape) > 2 or not all(type(n) is int and n >= 0 for n in shape):
        raise UnpicklingError("an array has an impossible shape")
    if math.prod(shape) * int(dtype.name[1]) != len(raw):
        raise UnpicklingError(f"an array has {len(raw)} bytes for the shape {shape}")
    if order not in ('C', 'F'):
        raise UnpicklingError("an array in another order than C or F is not admitted")
    raw = raw.encode('latin1') if isinstance(raw, str) else bytes(raw)
    return np.frombuffer(raw, np.dtype(dtype.order + dtype.name)).reshape(shape, order=order)


def _encode(text, encoding):
    """How Python 3 writes bytes for Python 2: as text, which is what Python 2's strings are read as too."""
    if _text(encoding) != 'latin1' or not isinstance(text, str):
        raise UnpicklingError("only text in latin1 is admitted")
    return text


# What a pickle may name, and what stands in for it when it is called.
_ADMITTED = {
    'multiarray _reconstruct': lambda *_: _Array(),
    'multiarray scalar': lambda dtype, raw: _array(raw, dtype, (), 'C').item(),
    'numeric _frombuffer': _Array,
    'numpy ndarray': None,
    'numpy dtype': _Dtype,
    '_codecs encode': _encode,
}


class _Global:
    """A name out of _ADMITTED."""

    def __init__(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("a name is no text")
        self.name = re.sub(r'^numpy\._?core\.', '', f'{module} {name}')
        if self.name not in _ADMITTED:
            raise UnpicklingError(f"{module[:60]}.{name[:60]} is not admitted")


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_VALUES = {'INT', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT',
           'BINSTRING', 'SHORT_BINSTRING', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
           'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'}
_CONTAINERS = {'EMPTY_LIST': list, 'EMPTY_DICT': dict, 'EMPTY_TUPLE': tuple}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def unpickle(content):
    """The object of a pickle (bytes) of arrays, numbers, text, lists, tuples and dictionaries keyed by text.

    Arrays come as _Array, strings of Python 2 as text in latin1. Neither Python's unpickling nor numpy's
    sees the file: they call what a pickle names, reserve the memory that it names, and recurse as deeply
    as it nests. The opcodes are carried out here, and all but those below are refused. Raises some
    exception for whatever is malformed or not admitted.
    """
    stack, marks, memo = [], [], {}

    def pop_to_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop_arguments():
        arguments = stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > 9:           # a dtype's state with metadata
            raise UnpicklingError("the arguments of a call are no short tuple")
        return arguments

    def top(kind):
        if not isinstance(stack[-1], kind):
            raise UnpicklingError("an item or a state for what takes none")
        return stack[-1]

    def set_items(items):
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, (str, bytes)):
                raise UnpicklingError("a key of a dictionary is no text")
            top(dict)[key] = value

    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        op = opcode.name
        if count > LARGEST_PICKLE:
            raise UnpicklingError(f"it has more than {LARGEST_PICKLE} parts")
        if op in _VALUES:
            stack.append(argument)
        elif op in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif op == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif op in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op == 'MARK':
            marks.append(len(stack))
        elif op in _CONTAINERS:
            stack.append(_CONTAINERS[op]())
        elif op in _TUPLES:
            stack[-_TUPLES[op]:] = [tuple(stack[-_TUPLES[op]:])]
        elif op == 'TUPLE':
            stack.append(tuple(pop_to_mark()))
        elif op == 'APPEND':
            item = stack.pop()
            top(list).append(item)
        elif op == 'APPENDS':
            items = pop_to_mark()
            top(list).extend(items)
        elif op == 'SETITEM':
            value, key = stack.pop(), stack.pop()
            set_items([key, value])
        elif op == 'SETITEMS':
            set_items(pop_to_mark())
        elif op == 'GLOBAL':
            stack.append(_Global(*argument.split(' ')))
        elif op == 'STACK_GLOBAL':
            name, module = stack.pop(), stack.pop()
            stack.append(_Global(module, name))
        elif op == 'REDUCE':
            arguments, function = pop_arguments(), stack.pop()
            if not isinstance(function, _Global):
                raise UnpicklingError("a call of what is no function")
            stack.append(_ADMITTED[function.name](*arguments))
        elif op == 'BUILD':
            state = pop_arguments()
            top((_Array, _Dtype)).set_state(*state)
        elif op == 'STOP':
            return stack.pop()
        elif op not in ('PROTO', 'FRAME'):
            raise UnpicklingError(f"the opcode {op} is not admitted")


# ---------------------------------------------------------------------------------------------------
# Fashion-MNIST: four files in the format of MNIST

def _load_idx(source, folder):
    def path_of(name):
        """Where a file is: packed or else unpacked; None if it is missing."""
        paths = (os.path.join(folder, name), os.path.join(folder, name[:-3]))
        return next((path for path in paths if os.path.isfile(path)), None)

    missing = [name for name in _IDX_FILES if path_of(name) is None]
    if missing and source.url is None:
        raise UserError(f"{os.path.join(folder, missing[0])} is missing; it is part of the repository: "
                        "check it out again, or leave --data out")
    if missing:
        _download({source.url + name: source.md5[_IDX_FILES.index(name)] for name in missing}, folder)
    paths, halves = [path_of(name) for name in _IDX_FILES], []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
        if images.shape[1:] != (28, 28) or not len(images):
            raise _damaged(images_path, f"it holds {images.shape}, not images of 28 x 28")
        if len(images) != len(labels):
            raise _damaged(images_path, f"it has {len(images)} images for {len(labels)} labels")
        if labels.max() >= len(source.class_names):
            raise _damaged(labels_path, f"there is a label {labels.max()}")
        images = np.pad(images, ((0, 0), *[(IDX_PADDING, IDX_PADDING)] * 2))       # [N, 32, 32]
        halves += [np.repeat(images[:, None], 3, axis=1), labels.astype('int64')]
    if source.md5:
        md5s = {os.path.basename(path): md5 for path, md5 in zip(paths, source.md5) if path.endswith('.gz')}
        _note_other_packing(folder, md5s)
    return source.class_names, halves


def read_idx(path, dimensions):
    """The uint8 array of a file in MNIST's format, gzipped (.gz) or not; UserError if it is anything else."""
    content = _read(path)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"it does not start like a file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f'>{dimensions}I', content[4:header])
    if len(content) - header != np.prod(shape, dtype=object) or len(content) == header:
        raise _damaged(path, f"{len(content) - header} bytes follow where {shape} were announced")
    return np.frombuffer(content, 'uint8', offset=header).reshape(shape)


# ---------------------------------------------------------------------------------------------------
# Batches

# The second part of what a random generator starts from, so that no two of them are the same.
ORDER, AUGMENTATION, RANDOM_BATCH, SPLIT, DROP_PATH = range(5)


def split(count, train_portion, seed):
    """Two disjoint parts of range(count): floor(train_portion * count) of it drawn by seed, and the rest.

    Raises UserError when one of them would be empty.
    """
    first = math.floor(train_portion * count) if 0 < train_portion < 1 else 0
    if not 0 < first < count:
        raise UserError(f"train_portion {train_portion} of {count} images leaves one part empty")
    order = np.random.default_rng([seed, SPLIT]).permutation(count)
    return order[:first], order[first:]


class Batches:
    """Batches of a set of images as a function of (epoch, step).

    images: uint8 [N, 3, H, W]; labels [N]; mean, std: [3], of pixels in 0..1; shuffle: a new order each
    epoch; augment: crop after padding by 4, flip, and cut out a square with sides of cutout_length
    (0: none); drop_last: leave out the images behind the last full batch. len() is the steps an epoch.
    part (i, n): make of each batch only the i-th of n parts; side by side they are the batch of one process, to
    the bit. The parts of the last batch may differ in size, and be empty.
    Raises UserError when batch_size is not in 1..N and when cutout_length is negative.
    """

    def __init__(self, images, labels, batch_size, mean, std, *, seed, shuffle, augment=False,
                 cutout_length=0, drop_last=False, shard=(0, 1)):
        if not 1 <= batch_size <= len(images):
            raise UserError(f"a batch of {batch_size} images cannot be drawn from {len(images)}: "
                            f"choose a --batch_size from 1 to {len(images)}")
        if cutout_length < 0:
            raise UserError(f"there is no square with sides of {cutout_length} pixels: "
                            "choose a --cutout_length from 0")
        self.images, self.labels = images, np.asarray(labels, 'int64').reshape(-1, 1)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.augment, self.cutout_length, self.drop_last = augment, cutout_length, drop_last
        self.shard = shard
        mean, std = (np.asarray(each, 'float32').reshape(3, 1, 1) for each in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self._order, self._lock = (None, None), threading.Lock()

    def __len__(self):
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def batch(self, epoch, step):
        """-> (float32 [B, 3, H, W], int64 [B, 1]); IndexError for a step that the epoch does not have."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)}")
        return self._make(self._epoch_order(epoch)[step * self.batch_size:(step + 1) * self.batch_size],
                          [self.seed, AUGMENTATION, epoch, step])

    def random_batch(self, epoch, step):
        """batch_size different images out of the whole set, whatever other steps drew."""
        key = [self.seed, RANDOM_BATCH, epoch, step]
        chosen = np.random.default_rng(key).choice(len(self.images), self.batch_size, replace=False)
        return self._make(chosen, [self.seed, AUGMENTATION, RANDOM_BATCH, epoch, step])

    def _epoch_order(self, epoch):
        if not self.shuffle:
            return np.arange(len(self.images))
        with self._lock:
            if self._order[0] != epoch:
                order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(len(self.images))
                self._order = epoch, order
            return self._order[1]

    def _shard_slice(self, count):
        """The slice of a batch of `count` images that `part` means."""
        number, parts = self.shard
        return slice(count * number // parts, count * (number + 1) // parts)

    def _make(self, chosen, key):
        mine = self._shard_slice(len(chosen))
        images, labels = self.images[chosen[mine]], self.labels[chosen[mine]]
        if not self.augment:
            return self._normalise(images), labels
        draws = Augmentation.draw(np.random.default_rng(key), len(chosen), images.shape[2])
        draws = Augmentation(*(each[mine] for each in draws))
        images = self._normalise(crop_and_flip(images, draws))
        if self.cutout_length:
            cutout(images, draws, self.cutout_length)
        return images, labels

    def _normalise(self, images):
        images = images.astype('float32')
        images *= self.scale
        images += self.shift
        return images


PADDING = 4


class Augmentation(namedtuple('Augmentation', 'top left flip y x')):
    """What is drawn for each image of a batch: the corner of the crop in the padded image, whether it is
    flipped, and the centre of the cutout; arrays [B]."""

    @classmethod
    def draw(cls, rng, count, size):
        corners, centres = rng.integers(0, 2 * PADDING + 1, (2, count)), rng.integers(0, size, (2, count))
        return cls(*corners, rng.random(count) < 0.5, *centres)


def crop_and_flip(images, draws):
    """[B, C, H, W] -> the same shape: padded with black, cropped, and mirrored where `flip` says so."""
    count, channels, height, width = images.shape
    padded = np.zeros((count, channels, height + 2 * PADDING, width + 2 * PADDING), images.dtype)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))               # [B, C, 9, 9, H, W]
    images = windows[np.arange(count), :, draws.top, draws.left]
    images[draws.flip] = images[draws.flip, :, :, ::-1]
    return images


def cutout(images, draws, length):
    """Sets a square around (y, x) to 0 in place, clipped at the border (arXiv 1708.04552)."""
    def covered(centre, size):
        first = centre[:, None] - length // 2
        return (np.arange(size) >= first) & (np.arange(size) < first + length)        # [B, size]
    height, width = images.shape[2:]
    square = covered(draws.y, height)[:, :, None] & covered(draws.x, width)[:, None, :]
    images *= ~square[:, None]


def prefetch(function, steps, num_workers=2, depth=None):
    """Yields function(step) for each of `steps`, in order, computed ahead by num_workers threads.

    At most `depth` (2 * num_workers) are ready or under way while one is in use. With 0 workers each is
    computed when it is asked for. What a worker raises is raised at its step. Closing the generator
    waits only for what is being computed at that moment.
    """
    if not num_workers:
        yield from map(function, steps)
        return
    pool, ahead, depth = ThreadPoolExecutor(num_workers), deque(), depth or 2 * num_workers
    try:
        for step in steps:
            ahead.append(pool.submit(function, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        pool.shutdown()
