"""Loads custom data into memory: folders of images, NumPy arrays, files in MNIST's format (Fashion-MNIST's own too).

`reader.load` calls these functions; each returns a `reader.Dataset`. A data set that would not fit into memory is
refused before it is read.
"""
from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import PIL

import utils
from engine.checkpoint import read_arrays, write_arrays
from engine.console import Progress
from engine.download import download
from engine.trainer import prefetch
from imagenet_reader import (LAYOUT, MAX_UNREADABLE, find_folders, read_class_folders, read_folders,
                             validation_image)
from reader import DATASETS, IDX_FILES, IDX_PADDING, IMAGE_SIZE, TEST_SPLIT, Dataset, damaged, read_file
from utils import UserError

log = logging.getLogger('darts')

DEFAULT_TEST_PORTION = 0.2
SMALLEST = 8                                # side of an image
CHUNK = 64                                  # images that a thread decodes at once
RULES = 1                                   # version of the rules by which an image file becomes pixels
ARRAYS = ('train_images', 'train_labels', 'test_images', 'test_labels')          # of an .npz


def make_dataset(name: str, class_names: Sequence[str] | None, arrays: Sequence[np.ndarray], **fields) -> Dataset:
    """Returns a Dataset with mean and standard deviation of its training images and the checksum of all arrays.

    arrays: training images, training labels, test images, test labels. class_names: None for numbers. Raises UserError
    when there is only one class.
    """
    images, labels, _, test_labels = arrays
    class_num = len(class_names) if class_names else int(max(labels.max(), test_labels.max())) + 1
    if class_num < 2:
        raise UserError(f"{name}: all images are of one class, at least two are needed")
    counts = np.bincount(labels, minlength=class_num)
    untrained = [str(k) for k in np.unique(test_labels) if not counts[k]]
    if untrained:
        log.warning(f"{name}: the classes {', '.join(untrained[:5])} have test images but no training images")
    if not counts.all():
        log.warning(f"{name}: {np.sum(counts == 0)} of the {class_num} classes have no images, the first is "
                    f"{int(np.argmin(counts))}" + ("; are the labels numbered from 0?" if not counts[0] else ''))
    mean, std = statistics(images)
    return Dataset(name, class_num, tuple(class_names or map(str, range(class_num))), *arrays, mean, std,
                   checksum=checksum(arrays), **fields)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation, float32 [3], of the channels of uint8 images [N, 3, H, W], as of 0..1.

    A channel without contrast gets the deviation of one grey level, so that it can be divided by.
    """
    sums, squares, count = np.zeros(3), np.zeros(3), images.size / 3         # of integers, so they are exact
    for first in range(0, len(images), 1000):
        pixels = np.ascontiguousarray(images[first:first + 1000])
        sums += pixels.sum(axis=(0, 2, 3), dtype='uint64')
        squares += np.square(pixels, dtype='uint16').sum(axis=(0, 2, 3), dtype='uint64')
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean ** 2, 1))
    return (mean / 255).astype('float32'), (std / 255).astype('float32')


def checksum(arrays: Sequence[np.ndarray]) -> int:
    """Returns the CRC-32 of the elements of all arrays."""
    crc = 0
    for array in arrays:
        for first in range(0, len(array), 1000):
            crc = zlib.crc32(np.ascontiguousarray(array[first:first + 1000]), crc)
    return crc


def check_memory(size: float, what: str) -> None:
    """Raises UserError when an array of `size` bytes for `what` would not fit into memory, with room for the run."""
    available = utils.available_memory()
    if size > 0.9 * available:
        raise UserError(f"{what} need {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available: use fewer "
                        "or smaller images, or train_imagenet.py, which reads images while it trains")


def check_size(height: int, width: int, path: str) -> None:
    """Raises UserError unless the cells can halve images of height x width twice."""
    if height != width or height % 4 or height < SMALLEST:
        raise UserError(f"{path} has images of {height} x {width}: accepted are square images whose side is a multiple "
                        f"of 4, at least {SMALLEST}; --dataset folder crops and resizes image files")


# ---------------------------------------------------------------------------------------------------
# Folders of images

def load_folder(folder: str, image_size: int | None = None, test_portion: float | None = None, seed: int = 0,
                cache_dir: str | None = None) -> Dataset:
    """Decodes train/<class>/ and val/<class>/ (or valid/, test/) of `folder`, or class folders without such halves.

    Each image becomes the square in its center, resized to image_size (default 32), as of `validation_image`. Without
    halves, test_portion (default 0.2) of each class, drawn by seed, is the test set. The pixels are kept in a file in
    cache_dir that is valid for these files only. Raises UserError for another layout and when more than 1 % of the
    images are unreadable.
    """
    size = image_size or IMAGE_SIZE
    check_size(size, size, f"--image_size {size}: {folder}")
    if test_portion is not None and not 0 < test_portion < 1:
        raise UserError(f"--test_portion {test_portion:g} leaves no training images: choose a number between 0 and 1")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: --dataset folder needs one with {LAYOUT}, or with class folders")
    train, test = find_folders(folder)
    if train and test:
        if test_portion is not None:
            raise UserError(f"--test_portion: {folder} has a test set already, {test}: leave out the flag")
        names, *halves = read_folders(train, test)
    elif test:
        raise UserError(f"{folder} has {test} but no train: expected {LAYOUT}, or class folders alone")
    else:
        names, samples = read_class_folders(train or folder)
        halves = [samples]
    if len(names) < 2:
        raise UserError(f"{train or folder} has the class {names[0]!r} only, at least two are needed: expected "
                        f"{LAYOUT}, or class folders alone")
    paths = [path for samples in halves for path in samples.paths]
    labels = np.concatenate([samples.labels for samples in halves])
    check_memory(3 * size ** 2 * len(paths), f"{len(paths)} images of {size} x {size}")
    images, readable = decoded(paths, folder, size, cache_dir)
    labels, count, split = labels[readable], int(np.sum(readable < len(halves[0].paths))), None
    if len(halves) == 2:
        arrays = images[:count], labels[:count], images[count:], labels[count:]
    else:
        split = {'test_portion': test_portion or DEFAULT_TEST_PORTION, 'seed': seed}
        train_indices, test_indices = stratified_split(labels, **split, names=names)
        log.info(f"{folder}: {len(train_indices)} training images and {len(test_indices)} test images, "
                 f"{split['test_portion']:g} of each class by seed {seed}")
        test_images = images[test_indices]
        for first in range(0, len(train_indices), 1000):          # in place: ascending indices only move images forward
            images[first:first + 1000][:len(train_indices) - first] = images[train_indices[first:first + 1000]]
        arrays = images[:len(train_indices)], labels[train_indices], test_images, labels[test_indices]
    return make_dataset('folder', names, arrays, split=split)


def stratified_split(labels: np.ndarray, test_portion: float, seed: int,
                     names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the training and of the test images, ascending: test_portion of each class by seed.

    Each class has at least one image in both parts; raises UserError for a class with a single image.
    """
    rng, test = np.random.default_rng([seed, TEST_SPLIT]), np.zeros(len(labels), bool)
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(f"the class {name!r} has {len(members)} readable images, but a split into training and "
                            "test images needs at least 2")
        count = min(max(1, round(test_portion * len(members))), len(members) - 1)
        test[rng.permutation(members)[:count]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def decoded(paths: list[str], folder: str, size: int, cache_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of the files, uint8 [N, 3, size, size], and the indices of those N that are readable.

    They come from the cache in cache_dir if it is of exactly these files, otherwise they are decoded and kept there.
    """
    key = hashlib.sha256(repr((RULES, PIL.__version__, size)).encode())
    for path in paths:
        with contextlib.suppress(OSError):                 # a link to a missing file: it is unreadable below
            status = os.stat(path)
            key.update(b'%d %d ' % (status.st_size, status.st_mtime_ns))
        key.update(os.fsencode(os.path.relpath(path, folder)) + b'\0')
    cache = None
    if cache_dir is not None:
        name = os.path.basename(os.path.abspath(folder)) or 'images'
        place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:8]
        cache = os.path.join(cache_dir, f'{name}-{size}x{size}-{place}.cache.npz')
        try:
            metadata, arrays = read_arrays(cache) if os.path.isfile(cache) else ({}, {})
            if metadata.get('files') == key.hexdigest():
                log.info(f"{cache}: {len(arrays['images'])} decoded images of these files")
                return arrays['images'], arrays['readable']
        except ValueError as error:
            log.warning(f"{cache} is damaged ({error}): the images are decoded again")
    images, unreadable = np.empty((len(paths), 3, size, size), 'uint8'), {}

    def decode(first: int) -> int:
        chunk = range(first, min(first + CHUNK, len(paths)))
        for k in chunk:
            try:
                images[k] = validation_image(paths[k], size, size).transpose(2, 0, 1)
            except Exception as error:     # Pillow raises errors of many types for a damaged file
                unreadable[k] = f"{paths[k]} ({type(error).__name__}: {error})"
        return len(chunk)

    with Progress(1, unit='image', total=len(paths), desc='decoding') as bar:
        # Threads, because Pillow decodes and resizes without the lock of the interpreter.
        for count in prefetch(decode, range(0, len(paths), CHUNK), utils.cores()):
            bar.update(count)
    if len(unreadable) > MAX_UNREADABLE * len(paths):
        raise UserError(f"cannot read {len(unreadable)} of {len(paths)} images, the first is "
                        f"{unreadable[min(unreadable)]}: copy them again, or remove them")
    for k in sorted(unreadable):
        log.warning(f"cannot read {unreadable[k]}: left out")
    readable = np.array([k for k in range(len(paths)) if k not in unreadable])
    images = images[readable] if unreadable else images
    if cache:
        try:
            os.makedirs(cache_dir, exist_ok=True)
            part = f'{cache}.{os.getpid()}'                # several runs may start at once
            utils.write_file(part, lambda file: write_arrays(
                file, {'files': key.hexdigest()}, {'images': images, 'readable': readable}))
            os.replace(part, cache)
            log.info(f"{cache}: decoded images, {images.nbytes / 1e6:.0f} MB; may be deleted")
        except OSError as error:
            log.warning(f"the decoded images cannot be kept in {cache}: {error.strerror or error}")
    return images, readable


# ---------------------------------------------------------------------------------------------------
# NumPy arrays

def load_npz(path: str) -> Dataset:
    """Reads an .npz with the arrays ARRAYS and, optionally, class_names; nothing is unpickled.

    Images are uint8 [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W]; labels are integers [N] or [N, 1] from 0 on.
    Raises UserError for any other file.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: --dataset npz needs --data FILE.npz with {', '.join(ARRAYS)}")
    try:
        with zipfile.ZipFile(path) as file:
            sizes = {member.filename.removesuffix('.npy'): member.file_size for member in file.infolist()}
            missing = [name for name in ARRAYS if name not in sizes]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}: it has {', '.join(map(repr, list(sizes)[:9]))}")
            check_memory(sum(sizes.values()), f"the arrays of {path}")
            damaged_member = file.testzip()                # before an array is read, see verify_zip
            if damaged_member is not None or len(file.infolist()) != _announced_entries(path, len(file.infolist())):
                raise UserError(f"{path} is damaged ({damaged_member or 'its directory'}): copy it again")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*ARRAYS, 'class_names') if name in sizes}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("one of its entries is not an array")
        names = _names_of_array(path, arrays.pop('class_names')) if 'class_names' in arrays else None
    except UserError:
        raise
    except Exception as error:             # zip and numpy fail in many ways on a damaged file
        raise UserError(f"{path} cannot be read as an .npz of plain arrays ({str(error)[:200]}): write it with "
                        "numpy.savez(path, train_images=..., train_labels=..., test_images=..., test_labels=...)"
                        ) from None
    ignored = set(sizes) - {*ARRAYS, 'class_names'}
    if ignored:
        log.info(f"{path}: {', '.join(sorted(ignored)[:9])} ignored")
    halves = []
    for half in ('train', 'test'):
        images = _images_of_array(f"{half}_images of {path}", arrays[f'{half}_images'])
        halves += [images, _labels_of_array(f"{half}_labels of {path}", arrays[f'{half}_labels'], len(images), names)]
    if halves[0].shape[1:] != halves[2].shape[1:]:
        raise UserError(f"{path} has training images of {halves[0].shape[2]} x {halves[0].shape[3]} and test images of "
                        f"{halves[2].shape[2]} x {halves[2].shape[3]}")
    largest = max(halves[1].max(), halves[3].max())
    if not names and largest >= len(halves[1]):
        raise UserError(f"{path} has labels up to {largest} for {len(halves[1])} training images: number the classes "
                        "from 0 on")
    return make_dataset('npz', names, halves)


def _announced_entries(path: str, default: int) -> int:
    """Returns the number of entries in the last record of a zip file, or `default` if it ends with a comment.

    A damaged directory may hide entries: without class_names the classes would be numbers.
    """
    with open(path, 'rb') as file:
        file.seek(-22, os.SEEK_END)
        record = file.read()
    return struct.unpack('<H', record[10:12])[0] if record.startswith(b'PK\5\6') else default


def _names_of_array(path: str, names: np.ndarray) -> list[str]:
    if names.dtype.kind not in 'US' or names.ndim != 1:
        raise UserError(f"class_names of {path} has shape {list(names.shape)} and type {names.dtype}, expected a list "
                        "of texts")
    return [name.decode('utf-8', 'backslashreplace') if isinstance(name, bytes) else name for name in names.tolist()]


def _images_of_array(what: str, images: np.ndarray) -> np.ndarray:
    """Returns images as [N, 3, H, W], without a copy."""
    if images.dtype != np.uint8:
        raise UserError(f"{what} has the type {images.dtype}: convert it to uint8, values 0 to 255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UserError(f"{what} has shape {list(images.shape)}, expected [N, H, W], [N, H, W, 1 or 3] or [N, 3, H, W]")
    check_size(*images.shape[2:], what)
    return np.broadcast_to(images, (len(images), 3, *images.shape[2:]))


def _labels_of_array(what: str, labels: np.ndarray, count: int, names: Sequence[str] | None) -> np.ndarray:
    """Returns labels as int64 [N]."""
    if labels.dtype.kind not in 'iu' or labels.shape not in ((count,), (count, 1)):
        raise UserError(f"{what} has shape {list(labels.shape)} and type {labels.dtype}, expected {count} integers, "
                        "one class number per image")
    low, high = int(labels.min()), int(labels.max())
    limit = len(names) if names else 1 << 31
    if low < 0 or high >= limit:
        raise UserError(f"{what} has values from {low} to {high}, expected class numbers from 0" + (
            f" to {limit - 1}, because there are {limit} class_names" if names else ''))
    return labels.reshape(-1).astype('int64')


# ---------------------------------------------------------------------------------------------------
# Files in MNIST's format

def load_idx(name: str, folder: str) -> Dataset:
    """Reads the four files of the data set `name` of reader.DATASETS, in MNIST's format, gzipped or not.

    Missing files are downloaded. Files with other contents than the published ones are read as what they are: classes
    are numbers, mean and standard deviation are theirs. Images of 28 x 28 get a black border of 2 pixels.
    """
    source = DATASETS[name]
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or '.'

    def find(name: str) -> str | None:
        """Returns the path of the gzipped or else of the unpacked file, also with MNIST's own dot in its name."""
        names = [each + suffix for suffix in ('.gz', '') for each in (name[:-3], name[:-3].replace('-idx', '.idx'))]
        return next((path for each in names if os.path.isfile(path := os.path.join(folder, each))), None)

    missing = [file for file in IDX_FILES if find(file) is None]
    if missing and source.url is None:
        raise UserError(f"{os.path.join(folder, missing[0])} is missing: it is part of the repository, "
                        "so check it out again or omit --data")
    if missing:
        download({source.url + file: source.md5[IDX_FILES.index(file)] for file in missing}, folder, IDX_FILES)
    paths, arrays, digests = [find(file) for file in IDX_FILES], [], []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, 3, digests), read_idx(labels_path, 1, digests)
        if len(images) != len(labels):
            raise UserError(f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels: "
                            "copy both again")
        padding = IDX_PADDING if images.shape[1:] == (28, 28) else 0
        if not padding:
            check_size(*images.shape[1:], images_path)
        images = np.pad(images, ((0, 0), *[(padding, padding)] * 2))
        arrays += [np.broadcast_to(images[:, None], (len(images), 3, *images.shape[1:])), labels.astype('int64')]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise UserError(f"{paths[0]} and {paths[2]} have images of different sizes")
    published = zip(paths, digests, source.contents, source.md5 or source.contents)
    if all(found == content or hashlib.md5(read_file(path), usedforsecurity=False).hexdigest() == md5
           for path, found, content, md5 in published):
        return Dataset(name, len(source.class_names), source.class_names, *arrays, np.array(source.mean, 'float32'),
                       np.array(source.std, 'float32'), padding=padding)
    data = make_dataset(name, None, arrays, padding=padding)
    log.info(f"{folder}: not the contents of {name}, but {len(arrays[1])} + {len(arrays[3])} images of "
             f"{images.shape[2] - 2 * padding} x {images.shape[1] - 2 * padding}, {data.class_num} classes with "
             "numbers as names")
    return data


def read_idx(path: str, dimensions: int, digests: list[str] | None = None) -> np.ndarray:
    """Returns the uint8 array of a file in MNIST's format, gzipped (.gz) or not.

    dimensions: of the array; 3 for images, 1 for labels. digests: gets the MD5 of the uncompressed file. Raises
    UserError for any other file.
    """
    content = read_file(path, gzip.open if path.endswith('.gz') else open)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise damaged(path, f"no header of a uint8 array with {dimensions} dimensions")
    shape = struct.unpack(f'>{dimensions}I', content[4:header])
    if len(content) - header != np.prod(shape, dtype=object) or len(content) == header:
        raise damaged(path, f"{len(content) - header} bytes of data for an array of shape {shape}")
    if digests is not None:
        digests.append(hashlib.md5(content, usedforsecurity=False).hexdigest())
    return np.frombuffer(content, 'uint8', offset=header).reshape(shape)
