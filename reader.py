"""Data sets and batches.

A data set is one array of bytes in memory; a batch is cut out of it, augmented and normalised by array
operations on the whole batch. Everything random is drawn from (seed, epoch, step), so that a batch does
not depend on what was drawn before it: any number of workers may prepare batches, and a resumed run
continues with the very images that would have come next.
"""
import gzip
import io
import logging
import os
import pickle
import re
import struct
import tarfile
import threading
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils import UserError

log = logging.getLogger('darts')

Dataset = namedtuple('Dataset', 'name class_num class_names train_images train_labels test_images test_labels '
                                'mean std')
Dataset.__doc__ = """images: uint8 [N, 3, 32, 32]; labels: int64 [N]; mean, std: float32 [3], of pixels in 0..1."""

Archive = namedtuple('Archive', 'folder url md5 train test labels')
Cifar = namedtuple('Cifar', 'archive class_names mean std')
Idx = namedtuple('Idx', 'url md5 class_names mean std')

_BCE = 'https://dataset.bj.bcebos.com/'
_FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
_IDX_FILES = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
              't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')

DATASETS = {
    'cifar10': Cifar(
        Archive('cifar-10-batches-py', _BCE + 'cifar/cifar-10-python.tar.gz', 'c58f30108f718f92721af3b95e74349a',
                tuple(f'data_batch_{i}' for i in range(1, 6)), ('test_batch',), 'labels'),
        ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
        (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    'cifar100': Cifar(
        Archive('cifar-100-python', _BCE + 'cifar/cifar-100-python.tar.gz', 'eb9058c3a382ffc7106e4002c42a8d85',
                ('train',), ('test',), 'fine_labels'),
        tuple(f'class {i}' for i in range(100)),
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
LARGEST_ARCHIVE = 1 << 29        # bytes unpacked; CIFAR has 186 MB: more is no data set but a trap


def default_folder(name):
    """Where a data set is looked for: dataset/<name>, beside this file if it is part of the repository."""
    folder = os.path.join('dataset', name)
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), folder) if name == 'fashion_mnist_sample' else folder


def load(name, folder=None):
    """The Dataset `name` of DATASETS from `folder`, downloaded there if it is missing.

    Raises UserError for an unknown name and for files that are missing and cannot be downloaded, cut
    off, altered or no such data set.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: there are {', '.join(DATASETS)}")
    source, folder = DATASETS[name], folder or default_folder(name)
    halves = _load_cifar(source, folder) if isinstance(source, Cifar) else _load_idx(source, folder)
    return Dataset(name, len(source.class_names), source.class_names, *halves,
                   np.array(source.mean, 'float32'), np.array(source.std, 'float32'))


def _download(url, md5, folder):
    """Downloads url into folder through Paddle's downloader, which verifies the checksum; returns the path."""
    from paddle.utils import download
    log.info(f"downloading {url} to {folder}")
    download.logger.setLevel(logging.CRITICAL)
    try:
        return download.get_path_from_url(url, folder, md5sum=md5, decompress=False)
    except Exception as error:         # whatever the network and the file system have to say
        raise UserError(f"{os.path.basename(url)} is not in {folder} and could not be downloaded ({error}): "
                        f"get it from {url} and put it there") from None


def _damaged(path, reason):
    return UserError(f"{path} is damaged or not what it should be ({reason}): delete it and run again to download it, "
                     "or copy it anew")


def _gunzip(path, limit):
    """The content of a .gz file of at most `limit` bytes; reading to the end verifies its checksum."""
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
            if len(content) > limit:
                raise _damaged(path, f"it unpacks to more than {limit} bytes")
            return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None


# ---------------------------------------------------------------------------------------------------
# CIFAR: a tar of pickles

def _load_cifar(source, folder):
    archive = source.archive
    unpacked = [path for path in (folder, os.path.join(folder, archive.folder))
                if os.path.isfile(os.path.join(path, archive.train[0]))]
    if unpacked:
        def members(name):
            path = os.path.join(unpacked[0], name)
            try:
                with open(path, 'rb') as file:
                    return path, file.read(LARGEST_ARCHIVE)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
    else:
        path = os.path.join(folder, os.path.basename(archive.url))
        if not os.path.isfile(path):
            path = _download(archive.url, archive.md5, folder)
        members = _tar_members(path, archive.folder)
    halves = []
    for names in (archive.train, archive.test):
        parts = [_cifar_batch(*members(name), archive.labels, len(source.class_names)) for name in names]
        halves += [np.concatenate(arrays) for arrays in zip(*parts)]
    return halves


def _tar_members(path, folder):
    """A function name -> (where, content) for the files in `folder` of a .tar.gz; nothing is unpacked to the disk."""
    content = _gunzip(path, LARGEST_ARCHIVE)
    try:
        tar = tarfile.open(fileobj=io.BytesIO(content), mode='r:')
        files = {member.name: member for member in tar.getmembers() if member.isfile()}
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise _damaged(path, error) from None

    def members(name):
        member = files.get(f'{folder}/{name}')
        if member is None:
            raise _damaged(path, f"{folder}/{name} is not in it")
        return f'{path}: {name}', tar.extractfile(member).read()
    return members


def _cifar_batch(where, content, label_key, class_num):
    """-> (images uint8 [N, 3, 32, 32], labels int64 [N]) of one pickled batch."""
    try:
        batch = unpickle(content)
        if not isinstance(batch, dict):
            raise ValueError("no dictionary")
        batch = {key.decode('latin1') if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = batch['data'], np.asarray(batch[label_key])
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2
                and images.shape[1] == 3 * IMAGE_SIZE * IMAGE_SIZE and len(images)):
            raise ValueError("its data are not uint8 [N, 3072]")
        if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1]:
            raise ValueError("its labels are not a whole number for each image")
        if labels.min() < 0 or labels.max() >= class_num:
            raise ValueError(f"its labels are not in 0..{class_num - 1}")
    except KeyError as error:
        raise _damaged(where, f"{error} is missing") from None
    except Exception as error:         # a hostile pickle can fail in any way
        raise _damaged(where, error) from None
    return images.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), labels.astype('int64')


class _ArrayState:
    """What the pickle of a numpy array builds; becomes an array in `_Unpickler.load`."""

    __slots__ = ('array',)

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, 'F' if fortran else 'C')


class _DtypeState:
    """The pickle of a plain numeric dtype."""

    __slots__ = ('name', 'order')

    def __init__(self, name, *_):
        name = name.decode('latin1') if isinstance(name, bytes) else name
        if not re.fullmatch(r'[uif][1248]|b1', name):
            raise pickle.UnpicklingError(f"dtype {name!r} is not admitted")
        self.name, self.order = name, '='

    def __setstate__(self, state):
        order = state[1].decode('latin1') if isinstance(state[1], bytes) else state[1]
        if order not in ('<', '>', '=', '|') or any(state[2:5]):
            raise pickle.UnpicklingError("a structured dtype is not admitted")
        self.order = order


def _array(raw, dtype, shape, order):
    """An array from its bytes, after a check of everything that numpy would trust."""
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    if not isinstance(dtype, _DtypeState) or not isinstance(raw, (bytes, bytearray)) or order not in ('C', 'F'):
        raise pickle.UnpicklingError("an array of objects is not admitted")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n <= len(raw) for n in shape):
        raise pickle.UnpicklingError("an array has an impossible shape")
    return np.frombuffer(bytes(raw), np.dtype(dtype.order + dtype.name)).reshape(shape, order=order)


class _Admitted:
    """A callable that a pickle may name; as an instance without state, nothing of it can be changed."""

    __slots__ = ('_function',)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("state for a function")


def _refuse(*_):
    raise pickle.UnpicklingError("an array made by a call is not admitted")


def _encode(text, encoding):
    """How Python 3 writes bytes for Python 2."""
    if encoding not in ('latin1', b'latin1'):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not admitted")
    return text.encode('latin1')


_ADMITTED = {
    ('multiarray', '_reconstruct'): _Admitted(lambda *_: _ArrayState()),
    ('multiarray', 'scalar'): _Admitted(lambda dtype, raw: _array(raw, dtype, (), 'C')),
    ('numeric', '_frombuffer'): _Admitted(lambda raw, dtype, shape, order: _array(raw, dtype, shape, order)),
    ('numpy', 'ndarray'): _Admitted(_refuse),
    ('numpy', 'dtype'): _Admitted(_DtypeState),
    ('_codecs', 'encode'): _Admitted(_encode),
}


class _Unpickler(pickle._Unpickler):
    """Reads arrays, numbers, strings, lists, tuples and dictionaries, and refuses everything else.

    It is the unpickler written in Python: the one in C reserves as much memory as a hostile pickle names.
    """

    def find_class(self, module, name):
        short = re.sub(r'^numpy\._?core\.', '', module)
        if (short, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return _ADMITTED[short, name]

    def persistent_load(self, _):
        raise pickle.UnpicklingError("a reference to something outside")


def unpickle(content):
    """The object of a pickle (bytes) of arrays and plain containers; strings of Python 2 become bytes.

    No code named in a pickle is run. Raises some exception for whatever is malformed or not admitted.
    """
    return _plain(_Unpickler(io.BytesIO(content), encoding='bytes').load())


def _plain(value):
    if isinstance(value, _ArrayState):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (_Admitted, _DtypeState)):
        raise pickle.UnpicklingError("neither an array nor a plain value")
    return value


# ---------------------------------------------------------------------------------------------------
# Fashion-MNIST: four files in the format of MNIST

def _load_idx(source, folder):
    arrays = []
    for number, name in enumerate(_IDX_FILES):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            if source.url is None:
                raise UserError(f"{path} is missing; it is part of the repository: check it out again, "
                                "or leave --data out")
            path = _download(source.url + name, source.md5[number], folder)
        arrays.append(read_idx(path, dimensions=3 if 'images' in name else 1))
    halves = []
    for images, labels, name in ((*arrays[:2], _IDX_FILES[0]), (*arrays[2:], _IDX_FILES[2])):
        path = os.path.join(folder, name)
        if images.shape[1:] != (28, 28) or not len(images):
            raise _damaged(path, f"its images are not 28 x 28 but {images.shape}")
        if len(images) != len(labels):
            raise _damaged(path, f"it has {len(images)} images for {len(labels)} labels")
        if labels.max() >= len(source.class_names):
            raise _damaged(path, f"there is a label {labels.max()}")
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))                          # [N, 32, 32]
        halves += [np.repeat(images[:, None], 3, axis=1), labels.astype('int64')]
    return halves


def read_idx(path, dimensions):
    """The uint8 array of a gzipped file in MNIST's format; UserError unless it is exactly that."""
    content = _gunzip(path, LARGEST_ARCHIVE)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"it does not start like a file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f'>{dimensions}I', content[4:header])
    if len(content) - header != np.prod(shape, dtype=object):
        raise _damaged(path, f"{len(content) - header} bytes follow where {shape} were announced")
    return np.frombuffer(content, 'uint8', offset=header).reshape(shape)


# ---------------------------------------------------------------------------------------------------
# Batches

# The second part of what a random generator starts from, so that no two of them are the same.
ORDER, AUGMENTATION, RANDOM_BATCH, SPLIT = range(4)


def split(count, train_portion, seed):
    """Two disjoint halves of range(count), shuffled: train_portion of it, and the rest.

    Raises UserError when one of them would be empty.
    """
    first = int(np.floor(train_portion * count))
    if not 0 < first < count:
        raise UserError(f"train_portion {train_portion} of {count} images leaves one part empty")
    order = np.random.default_rng([seed, SPLIT]).permutation(count)
    return order[:first], order[first:]


class Batches:
    """Batches of a set of images as a function of (epoch, step).

    images: uint8 [N, 3, H, W]; labels [N]; mean, std: [3], of pixels in 0..1; shuffle: a new order each
    epoch; augment: crop after padding by 4, flip, and cut out a square with sides of cutout_length
    (0: none); drop_last: leave out the images behind the last full batch. len() is the steps an epoch.
    Raises UserError when a batch is larger than the set.
    """

    def __init__(self, images, labels, batch_size, mean, std, *, seed, shuffle, augment=False, cutout_length=0,
                 drop_last=False):
        if not 1 <= batch_size <= len(images):
            raise UserError(f"a batch of {batch_size} images cannot be drawn from {len(images)}: "
                            "choose a smaller --batch_size")
        self.images, self.labels = images, np.asarray(labels, 'int64').reshape(-1, 1)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.augment, self.cutout_length, self.drop_last = augment, cutout_length, drop_last
        mean, std = (np.asarray(each, 'float32').reshape(3, 1, 1) for each in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self._order, self._lock = (None, None), threading.Lock()

    def __len__(self):
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def batch(self, epoch, step):
        """-> (float32 [B, 3, H, W], int64 [B, 1])."""
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

    def _make(self, chosen, key):
        images = self.images[chosen]
        if not self.augment:
            return self._normalise(images), self.labels[chosen]
        draws = Augmentation.draw(np.random.default_rng(key), len(images), images.shape[2])
        images = self._normalise(crop_and_flip(images, draws))
        if self.cutout_length:
            cutout(images, draws, self.cutout_length)
        return images, self.labels[chosen]

    def _normalise(self, images):
        return images * self.scale + self.shift


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
    padded = np.pad(images, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    rows = draws.top[:, None] + np.arange(height)                                     # [B, H]
    columns = np.where(draws.flip[:, None], np.arange(width)[::-1], np.arange(width)) + draws.left[:, None]
    return padded[np.arange(count)[:, None, None, None], np.arange(channels)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]


def cutout(images, draws, length):
    """Sets a square around (y, x) to 0 in place, clipped at the border (arXiv 1708.04552)."""
    def covered(centre, size):
        first = centre[:, None] - length // 2
        return (np.arange(size) >= first) & (np.arange(size) < first + length)        # [B, size]
    height, width = images.shape[2:]
    square = covered(draws.y, height)[:, :, None] & covered(draws.x, width)[:, None, :]
    np.copyto(images, 0, where=square[:, None])


def prefetch(function, steps, num_workers):
    """Yields function(step) for each of `steps`, in order, computed ahead by num_workers threads.

    With 0 workers each is computed when it is asked for. What a worker raises is raised at its step.
    """
    if not num_workers:
        yield from map(function, steps)
        return
    pool, ahead = ThreadPoolExecutor(num_workers), deque()
    try:
        for step in steps:
            ahead.append(pool.submit(function, step))
            if len(ahead) > 2 * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        pool.shutdown()
