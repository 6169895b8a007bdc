"""ImageNet: picture files, decoded and augmented in worker processes.

It is a reader of its own because its pictures are files to be decoded and not an array in memory, and
because the workers that decode them import this file and nothing of Paddle. A batch is a function of
(seed, epoch, step) here too, whatever the number of workers.
"""
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageEnhance

from reader import Batches
from utils import UserError

log = logging.getLogger('darts')

ImageNet = namedtuple('ImageNet', 'name class_num class_names train valid mean std')
ImageNet.__doc__ = """train, valid: Samples; class_names: a text for each label, or None; mean, std: float32 [3]."""
Samples = namedtuple('Samples', 'paths labels')

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = ('.jpeg', '.jpg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff')
# What a file may be, whatever its name is: Pillow opens formats too that it runs other programs for.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF')
MOST_PIXELS = 1 << 26                       # of a picture file; ImageNet's have 61 million at most
warnings.filterwarnings('ignore', module=r'PIL\b.*')    # of metadata that is damaged, and of large pictures

SIZE, SHORT_SIDE = 224, 256                 # of a picture for the network; to which validation resizes
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)   # of the random crop
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.2
MOST_BAD = 0.01                             # part of the pictures that may be unreadable


# ---------------------------------------------------------------------------------------------------
# Lists and folders

def load(data_dir, class_num):
    """The ImageNet in data_dir: train_list.txt and val_list.txt, or train/<class>/ and val/<class>/.

    Raises UserError when there is neither, for a line of a list that is no `path label`, for a label
    that is not below class_num, and when the folders of classes are not class_num in train and val alike.
    """
    lists = [os.path.join(data_dir, name) for name in ('train_list.txt', 'val_list.txt')]
    folders = [os.path.join(data_dir, name) for name in ('train', 'val')]
    if all(map(os.path.isfile, lists)):
        train, valid = (_read_list(path, data_dir, class_num) for path in lists)
        names = _names_by_folder(train, class_num)
    elif all(map(os.path.isdir, folders)):
        (names, train), (_, valid) = _read_folders(folders, class_num)
    else:
        raise UserError(f"no ImageNet in {data_dir}: it has to hold train_list.txt and val_list.txt with lines "
                        "`path label`, or the folders train and val with a folder of pictures for each class")
    return ImageNet('imagenet', class_num, names, train, valid, np.array(MEAN, 'float32'), np.array(STD, 'float32'))


def _read_list(path, data_dir, class_num):
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.read().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(' ')
        if not name.strip() or not re.fullmatch('[0-9]{1,9}', label):
            raise UserError(f"{path} line {number} is no `path label`: {line[:80]!r}")
        if int(label) >= class_num:
            raise UserError(f"{path} line {number}: label {label} is not below --class_num {class_num}")
        paths.append(os.path.join(data_dir, name.strip()))
        labels.append(int(label))
    if not paths:
        raise UserError(f"{path} is empty: there has to be a line `path label` for each picture")
    return Samples(paths, np.array(labels, 'int64'))


def _names_by_folder(samples, class_num):
    """The names of the folders that the pictures of each label are in; None where they do not tell."""
    folders = {}
    for path, label in zip(*samples):
        folders.setdefault(int(label), set()).add(os.path.basename(os.path.dirname(path)))
    names = [folders.get(label, ()) for label in range(class_num)]
    if any(len(each) != 1 for each in names) or len(set.union(*names)) != class_num:
        return None
    return tuple(name for each in names for name in each)


def _read_folders(folders, class_num):
    halves = []
    for folder in folders:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        paths, labels = [], []
        for label, name in enumerate(classes):
            pictures = sorted(entry.path for entry in os.scandir(os.path.join(folder, name))
                              if entry.name.lower().endswith(SUFFIXES))
            if not pictures:
                raise UserError(f"{os.path.join(folder, name)} is the folder of a class but has no picture "
                                f"({', '.join(SUFFIXES)})")
            paths += pictures
            labels += [label] * len(pictures)
        halves.append((tuple(classes), Samples(paths, np.array(labels, 'int64'))))
    (classes, _), (others, _) = halves
    if classes != others:
        name = sorted(set(classes) ^ set(others))[0]
        raise UserError(f"{folders[0]} and {folders[1]} differ in their classes: {name!r} is in one of them only")
    if len(classes) != class_num:
        raise UserError(f"{folders[0]} has {len(classes)} classes, --class_num is {class_num}")
    return halves


# ---------------------------------------------------------------------------------------------------
# Pictures

def open_picture(path):
    """An image in the mode L or RGB, as it is stored (not turned by EXIF), not decoded if it is a JPEG.

    Raises whatever Pillow does for a file that is none of FORMATS or damaged, and ValueError for one that claims
    to have more than MOST_PIXELS.
    """
    image = Image.open(path, formats=FORMATS)
    if math.prod(image.size) > MOST_PIXELS:
        raise ValueError(f"it claims to have {image.size[0]} x {image.size[1]} pixels")
    if image.mode in ('RGB', 'L'):
        return image
    if image.mode.startswith(('I', 'F')):                   # 16 bits and more
        pixels = np.asarray(image, 'float64')
        most = 65535 if pixels.max() > 255 else 255
        return Image.fromarray(np.clip(pixels * (255 / most), 0, 255).astype('uint8'))
    return image.convert('RGBA').convert('RGB') if image.mode in ('P', 'PA') else image.convert('RGB')


def crop_and_resize(image, box, size):
    """The part `box` (left, top, right, bottom) of an image from `open_picture`, as RGB of size x size.

    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 at which the part still has the
    size; nothing but the part is resized. What EXIF says of the orientation is applied to the result.
    """
    width, height = image.size
    if image.format == 'JPEG':
        smallest = size / (box[2] - box[0]), size / (box[3] - box[1])
        image.draft(None, (max(1, math.ceil(width * smallest[0])), max(1, math.ceil(height * smallest[1]))))
    scale = image.size[0] / width, image.size[1] / height
    box = (box[0] * scale[0], box[1] * scale[1], min(box[2] * scale[0], image.size[0]),
           min(box[3] * scale[1], image.size[1]))
    orientation = image.getexif().get(0x0112)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box).convert('RGB')
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


_ORIENTATIONS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


def random_box(width, height, rng):
    """A part of random area and aspect ratio (arXiv 1409.4842), -> (left, top, right, bottom)."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return left, top, left + w, top + h
    # The picture is too narrow for that: the largest part in its middle with an admitted ratio.
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_box(width, height, part):
    """The square in the middle whose sides are `part` of the short side."""
    side = part * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def jitter(image, rng):
    """Changes brightness, contrast, saturation and hue of an RGB image by random factors in random order."""
    factors = [rng.uniform(1 - most, 1 + most) for most in (BRIGHTNESS, CONTRAST, SATURATION)]
    turn = rng.uniform(-HUE, HUE)
    for number in rng.permutation(4):
        if number == 3:
            image = shift_hue(image, turn)
        else:
            image = _ENHANCE[number](image).enhance(factors[number])
    return image


_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image, turn):
    """Turns the hue of an RGB image by a part of the circle, value and saturation as they are.

    Pillow's HSV keeps 8 bits of the hue and takes twice the time. With high and low the largest and the
    smallest colour of a pixel and h its hue in sixths of the circle, a colour of the result is
    high - (high - low) * clip(min(k, 4 - k), 0, 1), k = (h + n) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = np.ascontiguousarray(np.asarray(image).reshape(-1, 3).T, 'float32')        # [3, pixels]
    high = np.maximum(np.maximum(red, green), blue)
    delta = high - np.minimum(np.minimum(red, green), blue)
    hue = np.where(high == red, green - blue,
                   np.where(high == green, blue - red + 2 * delta, red - green + 4 * delta))
    hue /= np.maximum(delta, 1)                     # grey: any hue
    result = np.empty((len(red), 3), 'uint8')
    for colour, n in enumerate((5, 3, 1)):
        k = hue + np.float32(n + 6 * turn)
        k -= 6 * np.floor(k / 6)
        part = np.clip(np.minimum(k, 4 - k), 0, 1)
        result[:, colour] = high - part * delta + np.float32(0.5)
    return Image.fromarray(result.reshape(image.size[1], image.size[0], 3))


def training_picture(path, rng):
    """A picture for the training: random part, flip, jitter; uint8 [224, 224, 3]."""
    image = open_picture(path)
    image = crop_and_resize(image, random_box(*image.size, rng), SIZE)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(jitter(image, rng))


def validation_picture(path, size=SIZE, short_side=SHORT_SIDE):
    """The middle of a picture whose short side is resized to short_side; uint8 [size, size, 3]."""
    image = open_picture(path)
    return np.asarray(crop_and_resize(image, central_box(*image.size, size / short_side), size))


def make_batch(paths, key, augment, mine=slice(None)):
    """What a worker does for a batch: -> (uint8 [B, 3, 224, 224], sources [B], {path: why it cannot be read}).

    mine: the part of the batch that is made. sources: the number among `paths` that each image is from. An
    unreadable picture is replaced by the next readable one in the training, and left out in the validation.
    """
    images, sources, bad = [], [], {}
    for number in range(len(paths))[mine]:
        for source in [*range(number, len(paths)), *range(number)] if augment else [number]:
            path = paths[source]
            if path in bad:
                continue
            try:
                picture = (training_picture(path, np.random.default_rng([*key, number])) if augment else
                           validation_picture(path))
            except Exception as error:         # Pillow fails in many ways on a damaged file
                bad[path] = f"{type(error).__name__}: {error}"
                continue
            images.append(picture)
            sources.append(source)
            break
    if augment and bad and not images:
        path, reason = next(iter(bad.items()))
        raise UserError(f"none of the {len(paths)} pictures of a batch can be read; {path}: {reason}")
    images = np.array(images, 'uint8').reshape(-1, SIZE, SIZE, 3)                # perhaps of no picture
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.array(sources, int), bad


# ---------------------------------------------------------------------------------------------------
# Batches

class ImageBatches(Batches):
    """Batches of picture files: reader.Batches with decoding and augmentation in `workers` (Workers).

    Unreadable pictures are named; UserError when they are more than 1 % of all.
    """

    def __init__(self, samples, batch_size, workers, **settings):
        super().__init__(samples.paths, samples.labels, batch_size, MEAN, STD, **settings)
        self.workers, self.bad = workers, {}
        self.seen = np.zeros(len(samples.paths), bool)

    def _make(self, chosen, key):
        mine = self._shard_slice(len(chosen))
        images, sources, bad = self.workers.call(make_batch, [self.images[i] for i in chosen], key, self.augment, mine)
        self.seen[chosen[mine]] = True
        for path, reason in bad.items():
            if path not in self.bad:
                self.bad[path] = reason
                log.warning(f"{path} cannot be read ({reason}): "
                            f"{'another one takes its place' if self.augment else 'left out'}")
        # A process that makes a part of each batch sees a part of the pictures in an epoch.
        looked_at = max(int(self.seen.sum()), len(self.images) // self.shard[1])
        if len(self.bad) > MOST_BAD * looked_at:
            raise UserError(f"{len(self.bad)} of {looked_at} pictures cannot be read, the last of them "
                            f"{list(self.bad)[-1]}: the data set is damaged, copy it anew")
        return self._normalise(images), self.labels[chosen[sources]]


class Workers:
    """Processes that decode pictures, to be used in a `with`; with a count of 0 the calling thread does it.

    To be made before Paddle computes for the first time: the processes are forked, and a fork does not go
    together with the threads that a computation starts.
    """

    def __init__(self, count):
        self._pool = None
        if count:
            method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn'
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context(method), _start_worker, (os.getpid(),))
            self.call(os.getpid)               # starts all of them
            self.processes = multiprocessing.active_children()

    def call(self, function, *arguments):
        """function(*arguments) in one of the processes; UserError when one of them has died."""
        if not self._pool:
            return function(*arguments)
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            why = ', '.join(self._reasons()) or "unknown reason"
            raise UserError(f"a worker process that decodes pictures died ({why}); out of memory? "
                            "Try fewer --num_workers; --resume continues the run") from None

    def _reasons(self):
        """What ended the processes that nobody asked to end; the others are ended."""
        deadline = time.time() + 2                  # the pool tells of a death before the system does
        while True:
            codes = {process.exitcode for process in self.processes} - {None, 0, -signal.SIGTERM}
            if codes or time.time() > deadline:
                break
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
        return [f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" for code in sorted(codes)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Ends the processes; what they have begun is finished."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


GRACE = 20                                     # seconds


def _start_worker(parent):
    """Ctrl-C and SIGTERM go to the whole group of processes: the parent decides what they mean, and a
    worker goes when the parent is gone, or some time after it was told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_exit_later, daemon=True).start())
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_later():
    time.sleep(GRACE)
    os._exit(0)


def _exit_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
