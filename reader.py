"""Loads the data sets and makes batches.

A data set is held in memory as uint8 arrays. custom_reader reads custom data and files in MNIST's format. A batch is
augmented and normalised by array operations on the entire batch. Its random generator is seeded with (seed, epoch,
step), so a batch does not depend on earlier draws: any number of workers may prepare batches, and a resumed run
continues with the same batches as an uninterrupted run.
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import math
import os
import pickle
import tarfile
import threading
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from utils import UserError, boolean, check_class_num, number, path


class Dataset(NamedTuple):
    """A data set in memory."""
    name: str
    class_num: int
    class_names: tuple[str, ...]
    train_images: np.ndarray     # uint8 [N, 3, H, W], H = W
    train_labels: np.ndarray     # int64 [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: np.ndarray             # float32 [3], of pixels in 0..1
    std: np.ndarray
    padding: int = 0             # width of the black border that the images have in addition to those of the files
    checksum: int | None = None  # of all arrays of custom data
    split: dict | None = None    # test_portion and seed, if the test set was drawn from class folders

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.train_images.shape[-1]


class Cifar(NamedTuple):
    """A published CIFAR archive: a .tar.gz of pickled batches."""
    folder: str                  # the folder inside the archive
    url: str
    md5: str                     # of the archive
    train: dict[str, str]        # {name of a batch file: its MD5}
    test: dict[str, str]
    labels: str                  # the key of the labels in a batch
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Idx(NamedTuple):
    """A data set of four files in MNIST's format."""
    url: str | None              # of the folder; None if there is no download
    md5: tuple[str, ...] | None  # of the four files, in the order of IDX_FILES
    contents: tuple[str, ...]    # MD5 of the uncompressed files
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_BCE = 'https://dataset.bj.bcebos.com/'
_CIFAR10 = 'airplane automobile bird cat deer dog frog horse ship truck'
_CIFAR100 = '''
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm'''
_FASHION = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
IDX_FILES = ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
             't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')

DATASETS = {
    'cifar10': Cifar(
        'cifar-10-batches-py', _BCE + 'cifar/cifar-10-python.tar.gz', 'c58f30108f718f92721af3b95e74349a',
        {'data_batch_1': 'c99cafc152244af753f735de768cd75f', 'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
         'data_batch_3': '54ebc095f3ab1f0389bbae665268c751', 'data_batch_4': '634d18415352ddfa80567beed471001a',
         'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb'},
        {'test_batch': '40351d587109b95175f43aff81a1287e'}, 'labels', tuple(_CIFAR10.split()),
        (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    'cifar100': Cifar(
        'cifar-100-python', _BCE + 'cifar/cifar-100-python.tar.gz', 'eb9058c3a382ffc7106e4002c42a8d85',
        {'train': '16019d7e3df5f24257cddd939b257f8d'}, {'test': 'f0ef6b0ae62326f3e7ffdfab6717acfc'},
        'fine_labels', tuple(_CIFAR100.split()),
        (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    'fashion_mnist': Idx(
        _BCE + 'fashion_mnist/',
        ('8d4fb7e6c68d591d4c3dfef9ec88bf0d', '25c81989df183df01b3e8a0aad5dffbe',
         'bef4ecab320f06d8554ea6380940ec79', 'bb300cfdad3c16e7a12a480ee83cd310'),
        ('f4a8712d7a061bf5bd6d2ca38dc4d50a', '9018921c3c673c538a1fc5bad174d6f9',
         '8181f5470baa50b63fa0f6fddb340f0a', '15d484375f8d13e6eb1aabb0c3f46965'),
        _FASHION, (0.2860,) * 3, (0.3530,) * 3),
    # Part of the repository (scripts/dev/make_sample.py), so it has no download.
    'fashion_mnist_sample': Idx(
        None, None, ('fc2dd2cd627f464cd717afe5a3ddc438', 'f2751a24eee86e9a35eee15ce0688f0d',
                     '11dd45a03b42d5ec35028c55043cb759', '5a0a86476c6e811c477bdf994db101cc'),
        _FASHION, (0.2860,) * 3, (0.3530,) * 3),
}
CUSTOM = ('folder', 'npz')       # the other values of --dataset: custom_reader

IMAGE_SIZE = 32
IDX_PADDING = 2                  # pixels per side, from 28 x 28 to 32 x 32
LARGEST_FILE = 1 << 29           # bytes, uncompressed; the published files have at most 186 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every script that reads a data set into memory."""
    add = parser.add_argument
    add('--dataset', default='cifar10', choices=[*sorted(DATASETS), *CUSTOM],
        help='data set; folder and npz: custom data (%(default)s)')
    add('--data', type=path, default=None,
        help='folder of the data set, into which missing files are downloaded (dataset/NAME); of --dataset folder: the '
             'folder with train/CLASS/ and val/CLASS/, or with CLASS/ alone; of --dataset npz: the file')
    add('--image_size', type=number(int, 8, 1024), default=None,
        help='side in pixels, a multiple of 4, to which the images of --dataset folder are resized (32)')
    add('--test_portion', type=number(float, 0, 1, open_low=True), default=None,
        help='fraction of each class that is the test set of --dataset folder with CLASS/ alone (0.2)')
    add('--cutout', type=boolean, default=True, help='cutout augmentation: a random square is set to 0 (%(default)s)')
    add('--cutout_length', type=number(int, 1), default=16, help='side of the cutout square in pixels (%(default)s)')


def load_for(args: argparse.Namespace) -> Dataset:
    """Loads the data set of the flags, and sets class_num, image_size and, of custom data, data_checksum in args.

    Decoded images are kept next to the folder of the run. Raises UserError when a flag contradicts the data set.
    """
    run = os.path.abspath(args.model_save_dir)
    if getattr(args, 'eval_only', False):
        run = os.path.dirname(os.path.abspath(args.pretrained))
    data = load(args.dataset, args.data, args.image_size, args.test_portion, args.seed, os.path.dirname(run))
    args.class_num, args.image_size = check_class_num(args.class_num, data), data.image_size
    args.data_checksum = data.checksum             # a run is not resumed with other images
    if args.cutout and args.cutout_length >= data.image_size:
        raise UserError(f"--cutout_length {args.cutout_length} covers images of {data.image_size} x {data.image_size}: "
                        "choose a smaller one, or --cutout False")
    return data


def default_folder(name: str) -> str:
    """Returns the default folder of a data set: dataset/<name>, next to this file for the sample."""
    folder = os.path.join('dataset', name)
    if name == 'fashion_mnist_sample':
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), folder)
    return folder


def load(name: str, data: str | None = None, image_size: int | None = None, test_portion: float | None = None,
         seed: int = 0, cache_dir: str | None = None) -> Dataset:
    """Loads the data set `name`, of DATASETS or CUSTOM, from the folder or file `data` (default: default_folder(name)).

    CIFAR is read from the published archive, or from the folder that it unpacks to, and has to have the published MD5.
    Fashion-MNIST is read from its four files, gzipped or not. Missing files are downloaded into the folder. The other
    arguments are those of custom_reader.load_folder. Raises UserError for an unknown name, for files that are missing
    and cannot be downloaded, for invalid files, and for an argument that contradicts the data set.
    """
    import custom_reader                   # it uses Dataset and the functions below
    if name not in DATASETS and name not in CUSTOM:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join([*DATASETS, *CUSTOM])}")
    if name in CUSTOM and not data:
        raise UserError(f"--dataset {name} needs --data {'FOLDER' if name == 'folder' else 'FILE'}")
    if name == 'folder':
        return custom_reader.load_folder(data, image_size, test_portion, seed, cache_dir)
    if test_portion is not None:
        raise UserError(f"--test_portion is for --dataset folder, {name} has its own test set: leave out the flag")
    if name == 'npz':
        dataset = custom_reader.load_npz(data)
    elif isinstance(DATASETS[name], Cifar):
        source = DATASETS[name]
        dataset = Dataset(name, len(source.class_names), source.class_names,
                          *_load_cifar(source, data or default_folder(name)),
                          np.array(source.mean, 'float32'), np.array(source.std, 'float32'))
    else:
        dataset = custom_reader.load_idx(name, data or default_folder(name))
    if image_size not in (None, dataset.image_size):
        raise UserError(f"--image_size {image_size}: the images of {name} have {dataset.image_size} x "
                        f"{dataset.image_size}, only those of --dataset folder are resized")
    return dataset


# ---------------------------------------------------------------------------------------------------
# Files

def damaged(path: str, reason: object) -> UserError:
    """Returns the error about a file with other contents than expected; reason may quote bytes of it."""
    reason = ''.join(c if c.isprintable() else '?' for c in str(reason)[:200]) or type(reason).__name__
    return UserError(f"{path} is damaged or not in the expected format ({reason}): copy it again")


def read_file(path: str, open_file: Callable = open) -> bytes:
    """Returns the content of a file; gzip.open as open_file unpacks it and verifies gzip's checksum."""
    try:
        with open_file(path, 'rb') as file:
            content = file.read(LARGEST_FILE + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): "
                        "check its permissions, or copy it again") from None
    if len(content) > LARGEST_FILE:
        raise damaged(path, f"more than {LARGEST_FILE} bytes")
    return content


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# ---------------------------------------------------------------------------------------------------
# CIFAR: a .tar.gz of pickles

def _load_cifar(source, folder):
    """-> train images, train labels, test images, test labels."""
    archive = folder if os.path.isfile(folder) else os.path.join(folder, os.path.basename(source.url))
    files = {**source.train, **source.test}
    unpacked = [path for path in (os.path.join(folder, source.folder), folder)
                if any(os.path.isfile(os.path.join(path, name)) for name in files)]
    if not os.path.isfile(archive) and unpacked:
        batches = {name: _unpickle(_read_verified(os.path.join(unpacked[0], name), md5, source.url), source.labels)
                   for name, md5 in files.items()}
    else:
        if not os.path.isfile(archive):
            from engine.download import download           # imports Paddle
            download({source.url: source.md5}, folder, (os.path.basename(source.url), source.folder, *files))
        content = _read_verified(archive, source.md5, source.url)
        with tarfile.open(fileobj=io.BytesIO(content), mode='r:gz') as tar:
            # In the order of the archive: going back in it would decompress it again.
            batches = {os.path.basename(member.name): _unpickle(tar.extractfile(member).read(), source.labels)
                       for member in tar if os.path.basename(member.name) in files}
    return [np.concatenate([batches[name][k] for name in names])
            for names in (source.train, source.test) for k in (0, 1)]


def _read_verified(path, md5, url):
    """Returns the content of a file that has this MD5; UserError for a missing and for any other file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: copy the complete folder again, or download {url} again")
    content = read_file(path)
    found = _md5(content)
    if found != md5:
        raise UserError(f"{path} has the MD5 {found} instead of the published {md5}, so it is not read: "
                        f"copy it again, or download {url} again")
    return content


def _unpickle(content, label_key):
    """-> (images uint8 [N, 3, 32, 32], labels int64 [N]) of a batch.

    Unpickling can run any code, so `content` has to come from _read_verified or from a verified archive.
    """
    batch = pickle.loads(content, encoding='latin1')
    return batch['data'].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE), np.array(batch[label_key], 'int64')


# ---------------------------------------------------------------------------------------------------
# Batches

# The second element of a generator's seed, which keeps the random streams apart.
ORDER, AUGMENTATION, RANDOM_BATCH, SPLIT, DROP_PATH, TEST_SPLIT = range(6)


def split(count: int, train_portion: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(count) at random into floor(train_portion * count) indices and the remaining ones.

    Raises UserError when one of the two would be empty.
    """
    first = math.floor(train_portion * count) if 0 < train_portion < 1 else 0
    if not 0 < first < count:
        raise UserError(f"train_portion {train_portion} of {count} images leaves one part empty: "
                        "choose another --train_portion between 0 and 1")
    order = np.random.default_rng([seed, SPLIT]).permutation(count)
    return order[:first], order[first:]


class Batches:
    """Batches of a set of images as a function of (epoch, step); len() is the number of steps per epoch.

    images: uint8 [M, 3, H, W]; labels: [M]; mean, std: [3], of pixels in 0..1. subset: indices [N] of the images to
    use, all of them when None: a copy of the part of a large data set would need its memory again.
    shuffle: use a new order in each epoch; drop_last: leave out the images after the last full batch.
    augment: random crop after padding by 4, random horizontal flip, and cutout with a square of side cutout_length
    (0: no cutout).
    shard (index, count): return only the index-th of `count` contiguous shards of each batch. The concatenated shards
    are bit-identical to the batch of one process. The shards of the last batch may differ in size and may be empty.
    Raises UserError when batch_size is not in 1..N and when cutout_length is negative.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, mean, std, *, seed: int,
                 shuffle: bool, augment: bool = False, cutout_length: int = 0, drop_last: bool = False,
                 shard: tuple[int, int] = (0, 1), subset: np.ndarray | None = None):
        self.count = len(images) if subset is None else len(subset)
        if not 1 <= batch_size <= self.count:
            raise UserError(f"a batch of {batch_size} images cannot be drawn from {self.count}: "
                            f"choose a --batch_size from 1 to {self.count}")
        if cutout_length < 0:
            raise UserError(f"cutout_length {cutout_length} is negative: choose a --cutout_length of at least 0")
        self.images, self.labels = images, np.asarray(labels, 'int64').reshape(-1, 1)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.augment, self.cutout_length, self.drop_last = augment, cutout_length, drop_last
        self.shard, self.subset = shard, subset
        mean, std = (np.asarray(values, 'float32').reshape(3, 1, 1) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self._order, self._lock = (None, None), threading.Lock()

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 images [B, 3, H, W] and int64 labels [B, 1]; IndexError unless 0 <= step < len(self)."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)}")
        return self._make(self._epoch_order(epoch)[step * self.batch_size:(step + 1) * self.batch_size],
                          [self.seed, AUGMENTATION, epoch, step])

    def random_batch(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a batch of batch_size different images of the set, drawn independently of other steps."""
        key = [self.seed, RANDOM_BATCH, epoch, step]
        chosen = np.random.default_rng(key).choice(self.count, self.batch_size, replace=False)
        return self._make(chosen, [self.seed, AUGMENTATION, RANDOM_BATCH, epoch, step])

    def _epoch_order(self, epoch):
        if not self.shuffle:
            return np.arange(self.count)
        with self._lock:
            if self._order[0] != epoch:
                order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.count)
                self._order = epoch, order
            return self._order[1]

    def _shard_slice(self, count):
        """Returns the slice of this shard in a batch of `count` images."""
        index, shards = self.shard
        return slice(count * index // shards, count * (index + 1) // shards)

    def _make(self, chosen, key):
        shard = self._shard_slice(len(chosen))
        places = chosen[shard] if self.subset is None else self.subset[chosen[shard]]
        images, labels = np.ascontiguousarray(self.images[places]), self.labels[places]
        if not self.augment:
            return self._normalise(images), labels
        # Drawn for the entire batch, so that an image's augmentation does not depend on the shards.
        draws = Augmentation.draw(np.random.default_rng(key), len(chosen), images.shape[2])
        draws = Augmentation(*(values[shard] for values in draws))
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


class Augmentation(NamedTuple):
    """The random draws of a batch: one array [B] per field."""
    top: np.ndarray              # corner of the crop in the padded image
    left: np.ndarray
    flip: np.ndarray             # bool
    y: np.ndarray                # centre of the cutout square
    x: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, size: int) -> Augmentation:
        """Draws for `count` images of size x size pixels."""
        corners, centres = rng.integers(0, 2 * PADDING + 1, (2, count)), rng.integers(0, size, (2, count))
        return cls(*corners, rng.random(count) < 0.5, *centres)


def crop_and_flip(images: np.ndarray, draws: Augmentation) -> np.ndarray:
    """Pads images [B, C, H, W] with black, crops them to H x W and mirrors those with draws.flip."""
    count, channels, height, width = images.shape
    padded = np.zeros((count, channels, height + 2 * PADDING, width + 2 * PADDING), images.dtype)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))               # [B, C, 9, 9, H, W]
    images = windows[np.arange(count), :, draws.top, draws.left]
    images[draws.flip] = images[draws.flip, :, :, ::-1]
    return images


def cutout(images: np.ndarray, draws: Augmentation, length: int) -> None:
    """Sets a square of side `length` around (y, x) to 0 in place, clipped at the border (arXiv 1708.04552)."""
    def covered(centre, size):
        first = centre[:, None] - length // 2
        return (np.arange(size) >= first) & (np.arange(size) < first + length)        # [B, size]
    height, width = images.shape[2:]
    square = covered(draws.y, height)[:, :, None] & covered(draws.x, width)[:, None, :]
    images *= ~square[:, None]
