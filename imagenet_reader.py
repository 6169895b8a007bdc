"""Input pipeline for ImageNet and for custom images: image files, decoded and augmented in worker processes.

`load` reads the lists of files, `training_image` and `validation_image` transform one file, `make_batch` makes a
batch in a worker, and `ImageBatches` normalizes it. A batch is a function of (seed, epoch, step), whatever the
number of workers. The workers need nothing of Paddle, so that this module does not import it.
"""
from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from reader import Batches
from utils import UserError

log = logging.getLogger('darts')

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = ('.jpeg', '.jpg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff')
# The admitted contents, whatever the suffix is: for some other formats Pillow runs external programs.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF')
MAX_PIXELS = 1 << 26                        # of a file; the largest of ImageNet has 61 million

SIZE, SHORT_SIDE = 224, 256                 # input of the network; short side after the resize for validation
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)   # of the random crop
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.2
MAX_UNREADABLE = 0.01                       # share of the images


class Samples(NamedTuple):
    """Image files and their labels, int64 [N]."""
    paths: list[str]
    labels: np.ndarray


class ImageNet(NamedTuple):
    """A data set: class_names holds a text per label or is None; mean and std are float32 [3]."""
    name: str
    class_num: int
    class_names: tuple[str, ...] | None
    train: Samples
    valid: Samples
    mean: np.ndarray
    std: np.ndarray


# ---------------------------------------------------------------------------------------------------
# Lists and folders

def load(data_dir: str, class_num: int) -> ImageNet:
    """Reads which images data_dir holds: train_list.txt and val_list.txt, or train/<class>/ and val/<class>/.

    Raises UserError if there is neither, if a line of a list is not `path label` with a label below class_num, and
    if train and val do not have the same class_num folders.
    """
    lists = [os.path.join(data_dir, name) for name in ('train_list.txt', 'val_list.txt')]
    folders = [os.path.join(data_dir, name) for name in ('train', 'val')]
    if all(map(os.path.isfile, lists)):
        train, valid = (_read_list(path, data_dir, class_num) for path in lists)
        names = _names_by_folder(train, class_num)
    elif all(map(os.path.isdir, folders)):
        (names, train), (valid_names, valid) = map(_read_folder, folders)
        if names != valid_names:
            name = min(set(names) ^ set(valid_names))
            raise UserError(f"{folders[0]} and {folders[1]} have different classes: only one of them has {name!r}")
        if len(names) != class_num:
            raise UserError(f"{folders[0]} has {len(names)} classes, but --class_num is {class_num}")
    else:
        raise UserError(f"no ImageNet in {data_dir}: it must contain train_list.txt and val_list.txt with lines "
                        "`path label`, or the folders train and val with one folder of images per class")
    return ImageNet('imagenet', class_num, names, train, valid, np.array(MEAN, 'float32'), np.array(STD, 'float32'))


def _read_list(path, data_dir, class_num):
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(' ')
        if not name.strip() or not re.fullmatch('[0-9]{1,9}', label):
            raise UserError(f"{path} line {number} is not `path label`: {line[:80]!r}")
        if int(label) >= class_num:
            raise UserError(f"{path} line {number}: label {label} is not below --class_num {class_num}")
        paths.append(os.path.join(data_dir, name.strip()))
        labels.append(int(label))
    if not paths:
        raise UserError(f"{path} is empty: it must contain one line `path label` per image")
    return Samples(paths, np.array(labels, 'int64'))


def _names_by_folder(samples, class_num):
    """Returns the folder name of each label, or None unless folders and labels correspond one to one."""
    pairs = {(int(label), os.path.basename(os.path.dirname(path))) for path, label in zip(*samples)}
    names = dict(pairs)
    return tuple(names[label] for label in sorted(names)) if (
        len(pairs) == len(names) == len(set(names.values())) == class_num) else None


def _read_folder(folder):
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(entry.path for entry in os.scandir(os.path.join(folder, name))
                        if entry.name.lower().endswith(SUFFIXES))
        if not images:
            raise UserError(f"{os.path.join(folder, name)} is the folder of a class but has no image file "
                            f"({', '.join(SUFFIXES)})")
        paths += images
        labels += [label] * len(images)
    return tuple(classes), Samples(paths, np.array(labels, 'int64'))


# ---------------------------------------------------------------------------------------------------
# Transformations

Box = tuple[float, float, float, float]     # left, top, right, bottom in pixels


def open_image(path: str) -> Image.Image:
    """Opens an image in the mode L or RGB, without its EXIF orientation applied; a JPEG is not decoded yet.

    Raises any of Pillow's errors if the file is damaged or none of FORMATS, and ValueError if its header announces
    more than MAX_PIXELS.
    """
    image = Image.open(path, formats=FORMATS)
    try:
        return _as_l_or_rgb(image)
    except Exception:
        image.close()
        raise


def _as_l_or_rgb(image: Image.Image) -> Image.Image:
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"its header announces {image.size[0]} x {image.size[1]} pixels")
    if image.mode in ('RGB', 'L'):
        return image
    if image.mode.startswith(('I', 'F')):                   # 16 bits and more
        pixels = np.asarray(image, 'float64')
        white = 65535 if pixels.max() > 255 else 255
        return Image.fromarray(np.clip(pixels * (255 / white), 0, 255).astype('uint8'))
    return image.convert('RGBA').convert('RGB') if image.mode in ('P', 'PA') else image.convert('RGB')


def crop_and_resize(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Returns the part `box` of an image from `open_image` as RGB of size x size, with its EXIF orientation applied.

    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 at which the box still has the size: 3 times as
    fast for an image of 12 megapixels. Only the box is resized.
    """
    width, height = image.size
    if image.format == 'JPEG':
        smallest = size / (box[2] - box[0]), size / (box[3] - box[1])
        image.draft(None, (max(1, math.ceil(width * smallest[0])), max(1, math.ceil(height * smallest[1]))))
    scale = image.size[0] / width, image.size[1] / height
    box = (box[0] * scale[0], box[1] * scale[1], min(box[2] * scale[0], image.size[0]),
           min(box[3] * scale[1], image.size[1]))
    return ImageOps.exif_transpose(image.resize((size, size), Image.Resampling.BILINEAR, box).convert('RGB'))


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws a box of random area and aspect ratio (arXiv 1409.4842)."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return left, top, left + w, top + h
    # The image is too narrow: take the largest box in its center with an admitted ratio.
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_box(width: int, height: int, share: float) -> Box:
    """Returns the square in the center whose sides are `share` of the short side."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB image by random factors in random order."""
    factors = [rng.uniform(1 - limit, 1 + limit) for limit in (BRIGHTNESS, CONTRAST, SATURATION)]
    turn = rng.uniform(-HUE, HUE)
    for number in rng.permutation(4):
        image = shift_hue(image, turn) if number == 3 else _ENHANCE[number](image).enhance(factors[number])
    return image


_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue of an RGB image by `turn` of the color circle; value and saturation stay unchanged.

    Through Pillow's HSV, which also rounds hue to 8 bits, a training image takes 20 % longer. With high and low the
    largest and the smallest color of a pixel and h its hue in sixths of the circle, a color of the result is
    high - (high - low) * clip(min(k, 4 - k), 0, 1), k = (h + n) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = np.ascontiguousarray(np.asarray(image).reshape(-1, 3).T, 'float32')        # [3, pixels]
    high = np.maximum(np.maximum(red, green), blue)
    delta = high - np.minimum(np.minimum(red, green), blue)
    hue = np.where(high == red, green - blue,
                   np.where(high == green, blue - red + 2 * delta, red - green + 4 * delta))
    hue /= np.maximum(delta, 1)                     # grey has no hue: any value will do
    result = np.empty((len(red), 3), 'uint8')
    for color, n in enumerate((5, 3, 1)):
        k = hue + np.float32(n + 6 * turn)
        k -= 6 * np.floor(k / 6)
        result[:, color] = high - np.clip(np.minimum(k, 4 - k), 0, 1) * delta + np.float32(0.5)
    return Image.fromarray(result.reshape(image.size[1], image.size[0], 3))


def training_image(path: str, rng: np.random.Generator) -> np.ndarray:
    """Reads an image for training: random crop, flip, jitter; uint8 [224, 224, 3]."""
    with open_image(path) as file:
        image = crop_and_resize(file, random_box(*file.size, rng), SIZE)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(jitter(image, rng))


def validation_image(path: str, size: int = SIZE, short_side: int = SHORT_SIDE) -> np.ndarray:
    """Reads the center of an image whose short side is resized to short_side; uint8 [size, size, 3]."""
    with open_image(path) as image:
        return np.asarray(crop_and_resize(image, center_box(*image.size, size / short_side), size))


# ---------------------------------------------------------------------------------------------------
# Batches

def make_batch(paths: Sequence[str], key: Sequence[int], augment: bool, shard: slice = slice(None)) -> tuple:
    """Makes the images `shard` of a batch, -> (uint8 [B, 3, 224, 224], sources [B], {path: why it is unreadable}).

    sources: the positions in `paths` of the files that the images come from. An unreadable image is replaced by the
    next readable one in training and left out in validation. key: seeds the augmentation, with the position.
    Raises UserError if no image can be read in training.
    """
    images, sources, unreadable = [], [], {}
    for number in range(len(paths))[shard]:
        for source in [*range(number, len(paths)), *range(number)] if augment else [number]:
            path = paths[source]
            if path in unreadable:
                continue
            try:
                images.append(training_image(path, np.random.default_rng([*key, number])) if augment else
                              validation_image(path))
            except Exception as error:         # Pillow raises errors of many types for a damaged file
                unreadable[path] = f"{type(error).__name__}: {error}"
                continue
            sources.append(source)
            break
    if augment and unreadable and not images:
        path, reason = next(iter(unreadable.items()))
        raise UserError(f"cannot read any of the {len(paths)} images of a batch; {path}: {reason}")
    images = np.array(images, 'uint8').reshape(-1, SIZE, SIZE, 3)                # also without any image
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.array(sources, int), unreadable


class ImageBatches(Batches):
    """Batches of image files: `reader.Batches`, decoded and augmented by Workers.

    Logs each unreadable image once. Raises UserError if more than 1 % of the images are unreadable.
    """

    def __init__(self, samples: Samples, batch_size: int, workers: Workers, **settings: Any) -> None:
        super().__init__(samples.paths, samples.labels, batch_size, MEAN, STD, **settings)
        self.workers, self.unreadable = workers, {}
        self.seen = np.zeros(len(samples.paths), bool)

    def _make(self, chosen, key):
        shard = self._shard_slice(len(chosen))
        images, sources, unreadable = self.workers.call(
            make_batch, [self.images[i] for i in chosen], key, self.augment, shard)
        self.seen[chosen[shard]] = True
        for path, reason in unreadable.items():
            if path not in self.unreadable:
                self.unreadable[path] = reason
                log.warning(f"cannot read {path} ({reason}): "
                            f"{'replaced by another image' if self.augment else 'left out'}")
        # A rank that makes a shard of each batch sees a share of the images per epoch.
        count = max(int(self.seen.sum()), len(self.images) // self.shard[1])
        if len(self.unreadable) > MAX_UNREADABLE * count:
            raise UserError(f"cannot read {len(self.unreadable)} of {count} images, the last of them "
                            f"{list(self.unreadable)[-1]}: the data set is damaged, copy it again")
        return self._normalise(images), self.labels[chosen[sources]]


class Workers:
    """Processes that make batches, as a context manager; with count 0 the calling thread makes them.

    Has to be created before Paddle computes for the first time: the processes are forked, and a fork does not copy
    the threads of a computation but may copy the locks that they hold.
    """

    def __init__(self, count: int) -> None:
        self._pool, before = None, multiprocessing.active_children()
        if count:
            # Ctrl-C, and SIGTERM from a job scheduler, reach all processes of a run. Only the parent handles them,
            # because it needs the workers until it has saved: they inherit this mask.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context('fork'), _exit_with_parent)
            self._results = self._pool._result_queue._writer
            list(self._pool.map(time.sleep, [0.1] * count))       # forks all of them, also where Python forks on demand
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.processes = [child for child in multiprocessing.active_children() if child not in before]

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Returns function(*arguments), called in one of the processes. Raises UserError if one of them died."""
        if not self._pool:
            return function(*arguments)
        try:
            future = self._pool.submit(function, *arguments)
            # The pool waits without end for the rest of a result if its worker died while it sent it.
            while not wait([future], timeout=5).done:
                if any(process.exitcode is not None for process in self.processes):
                    raise BrokenProcessPool
            return future.result()
        except BrokenProcessPool:
            raise UserError(f"a worker process that decodes images died ({self._death()}); if memory ran out, reduce "
                            "--num_workers; --resume continues the run") from None

    def _death(self):
        deadline = time.time() + 2             # the pool notices a death before the exit code can be read
        while not (codes := [process.exitcode for process in self.processes if process.exitcode]):
            if time.time() > deadline:
                return "unknown reason"
            time.sleep(0.01)
        return f"signal {signal.Signals(-codes[0]).name}" if codes[0] < 0 else f"exit code {codes[0]}"

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._pool:
            return
        closing = threading.Thread(target=self._pool.shutdown, kwargs={'cancel_futures': True}, daemon=True)
        closing.start()
        while closing.is_alive():
            if any(process.exitcode for process in self.processes):
                for process in self.processes:           # they may wait for a lock that has died with one of them
                    process.kill()
                closing.join(1)
                if closing.is_alive() and not self._results.closed:
                    self._results.close()                # the last writer: the pool waits for the rest of a result
            closing.join(0.02)


def _exit_with_parent():
    """Starts a thread that ends this worker when the parent ends, also by SIGKILL."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
