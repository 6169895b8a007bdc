"""Input pipeline for ImageNet and for custom images: image files, decoded and augmented in worker processes.

`load` reads the lists of files, `training_image` and `validation_image` transform one file, `make_batch` makes a
batch in a worker, and `ImageBatches` normalizes it. A batch is a function of (seed, epoch, step), whatever the
number of workers. The workers need nothing of Paddle, so that this module does not import it. custom_reader and
scripts/predict.py read image files with this module too.
"""
from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from reader import Batches
from utils import UserError, contents_of, decode, folders_in, is_hidden

if TYPE_CHECKING:
    from engine.workers import Workers

log = logging.getLogger('darts')

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = ('.jpeg', '.jpg', '.jfif', '.jpe', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
            '.pnm')
# The admitted contents, whatever the suffix is: for some other formats Pillow runs external programs.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM')
MAX_PIXELS = 1 << 26                        # of a file; the largest of ImageNet has 61 million
MAX_JPEG_PIXELS = 1 << 27                   # a large JPEG is decoded at a smaller scale
DARKEST_16_BIT = 4096                       # largest value of an image that uses the range of 16 bits

SIZE, SHORT_SIDE = 224, 256                 # input of the network; short side after the resize for validation
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)   # of the random crop
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.2
MAX_UNREADABLE = 0.01                       # share of the images
VALIDATION_FOLDERS = ('val', 'valid', 'validation', 'test')        # next to train


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

    The folder val may be named valid or test. Raises UserError if there is neither, if a line of a list is not
    `path label` with a label below class_num, if listed files do not exist, and if train and val do not have the same
    class_num folders.
    """
    lists = [os.path.join(data_dir, name) for name in ('train_list.txt', 'val_list.txt')]
    if all(map(os.path.isfile, lists)):
        train, valid = (_read_list(path, data_dir, class_num) for path in lists)
        names = _names_by_folder(train, class_num)
    else:
        train_folder, valid_folder = find_folders(data_dir)
        if not train_folder or not valid_folder:
            raise UserError(f"no ImageNet in {data_dir}: it must contain train_list.txt and val_list.txt with lines "
                            f"`path label`, or {LAYOUT} (train.py --dataset folder splits class folders); it contains "
                            f"{contents_of(data_dir)}")
        names, train, valid = read_folders(train_folder, valid_folder)
        if len(names) != class_num:
            raise UserError(f"{train_folder} has {len(names)} classes, but --class_num is {class_num}")
    return ImageNet('imagenet', class_num, names, train, valid, np.array(MEAN, 'float32'), np.array(STD, 'float32'))


LAYOUT = f"train/<class>/<image> and {VALIDATION_FOLDERS[0]}/<class>/<image>"


def _read_list(path, data_dir, class_num):
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    other_encoding = None
    try:
        text = decode(path, content)
    except UserError as error:
        if b'\0' in content:                    # UTF-16
            raise
        # The names of the files may have the encoding of the list: the system takes their bytes.
        other_encoding, text = error, os.fsdecode(content)
    paths, labels, hidden, malformed = [], [], 0, []
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r'(.*?)[\s,;]+([0-9]{1,9})', line.strip(), re.DOTALL)
        name = match[1].strip('"\' \t') if match else ''
        if not name:
            malformed.append((number, line))
            continue
        if int(match[2]) >= class_num:
            raise UserError(f"{path} line {number}: label {match[2]} is not below --class_num {class_num}")
        if '\\' in name and not os.path.exists(os.path.join(data_dir, name)):
            name = name.replace('\\', '/')
        if is_hidden(os.path.basename(name)):
            hidden += 1
            continue
        paths.append(os.path.join(data_dir, name))
        labels.append(int(match[2]))
    if malformed:
        number, line = malformed[0]
        hint = "; it looks like a header: remove the line" if number == 1 and len(malformed) == 1 and paths else ''
        raise UserError(f"{path} line {number} is not `path label`: {line.strip()[:80]!r}{hint}")
    if not paths:
        raise UserError(f"{path} is empty: it must contain one line `path label` per image")
    if hidden:
        log.info(f"{path}: {hidden} files whose names begin with a dot are ignored")
    _check_files(path, data_dir, paths, other_encoding)
    return Samples(paths, np.array(labels, 'int64'))


def _check_files(path, data_dir, paths, other_encoding):
    """Raises UserError when more than 1 % of the paths of the list `path` do not exist; warns of a smaller share."""
    existing = {}
    for folder in {os.path.dirname(each) for each in paths}:
        try:
            existing[folder] = {entry.name for entry in os.scandir(folder)}
        except (OSError, ValueError):            # a null byte in the name
            existing[folder] = set()
    missing = [each for each in paths if os.path.basename(each) not in existing[os.path.dirname(each)]]
    if not missing:
        return
    if other_encoding:
        raise other_encoding
    reason = ''
    try:
        if os.path.exists(os.fsencode(missing[0]).decode('gb18030')):
            reason = f"; {path} is in GBK: convert it with iconv -f GB18030 -t UTF-8"
    except (UnicodeError, ValueError):
        pass
    message = f"{path}: {len(missing)} of {len(paths)} files do not exist, the first is {missing[0]}{reason}"
    if len(missing) > MAX_UNREADABLE * len(paths):
        raise UserError(f"{message}; the paths are relative to {data_dir}")
    log.warning(message)


def _names_by_folder(samples, class_num):
    """Returns the folder name of each label, or None unless folders and labels correspond one to one."""
    pairs = {(int(label), os.path.basename(os.path.dirname(path))) for path, label in zip(*samples)}
    names = dict(pairs)
    return tuple(names[label] for label in sorted(names)) if (
        len(pairs) == len(names) == len(set(names.values())) == class_num) else None


def find_folders(data_dir: str) -> tuple[str | None, str | None]:
    """Returns the folders train and val (or valid, or test) in data_dir, None for one that does not exist.

    Next to other folders, those of classes, they are folders of classes too, unless train has folders itself.
    """
    names = folders_in(data_dir)
    train = os.path.join(data_dir, 'train') if 'train' in names else None
    if names - {'train', *VALIDATION_FOLDERS} and not (train and folders_in(train)):
        return None, None
    found = [os.path.join(data_dir, name) for name in VALIDATION_FOLDERS if name in names]
    if len(found) > 1:
        log.info(f"{found[0]} is used for validation, {' and '.join(found[1:])} not")
    others = sorted(names - {'train', *VALIDATION_FOLDERS})
    if train and others:
        log.info(f"{data_dir}: {', '.join(others[:5])} ignored, because the images are in train")
    return train, found[0] if found else None


def read_folders(train: str, valid: str) -> tuple[tuple[str, ...], Samples, Samples]:
    """Returns class names and the images of both folders of class folders; UserError when their classes differ."""
    (names, train_samples), (valid_names, valid_samples) = map(read_class_folders, (train, valid))
    if names != valid_names:
        name = min(set(names) ^ set(valid_names))
        raise UserError(f"{train} and {valid} have different classes: only one of them has {name!r}")
    return names, train_samples, valid_samples


def read_class_folders(folder: str) -> tuple[tuple[str, ...], Samples]:
    """Returns the names of the class folders in `folder`, sorted, and their images.

    Hidden files are ignored; files that are no images are counted in a log line. Raises UserError when there is no
    class folder, or one without an image.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)
                   and not os.path.isfile(os.path.join(entry.path, 'args.json'))]                # the folder of a run
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        flat = sum(entry.name.lower().endswith(SUFFIXES) and not entry.is_dir() for entry in entries)
        if not classes:
            expected = os.path.join(folder, '<class>', '<image>')
            raise UserError(f"{folder} has {flat} images but no folder per class: move each image into the folder of "
                            f"its class, {expected}, or list the images of both halves with their labels in "
                            "train_list.txt and val_list.txt (train_imagenet.py)" if flat else
                            f"{folder} has no folder per class: expected {expected}")
        paths, labels, ignored = [], [], Counter({'without a class': flat} if flat else {})
        for label, name in enumerate(classes):
            path = os.path.join(folder, name)
            files = sorted((entry for entry in os.scandir(path) if not is_hidden(entry.name)), key=lambda e: e.name)
            images = [entry.path for entry in files if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()]
            if not images:
                nested = f"it contains {contents_of(path)}" if files else "it is empty"
                raise UserError(f"{path} is the folder of a class but has no image file ({', '.join(SUFFIXES)}): "
                                f"{nested}; the layout is <class>/<image>")
            chosen = set(images)
            ignored.update(os.path.splitext(entry.name)[1].lower() or 'folders' for entry in files
                           if entry.path not in chosen)
            paths += images
            labels += [label] * len(images)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
    if ignored:
        kinds = ', '.join(f'{count} {kind}' for kind, count in ignored.most_common(5))
        log.info(f"{folder}: ignored {sum(ignored.values())} entries that are not images in a class folder: {kinds}")
    return tuple(classes), Samples(paths, np.array(labels, 'int64'))


# ---------------------------------------------------------------------------------------------------
# Transformations

Box = tuple[float, float, float, float]     # left, top, right, bottom in pixels


def open_image(path: str) -> Image.Image:
    """Opens an image in the mode L or RGB, without its EXIF orientation applied; a JPEG is not decoded yet.

    Values of more than 8 bits are scaled to 0..255: 16 bits from 0..65535; floats from 0..1, or from 0..255 when one is
    above 1. Transparency is ignored, unless it alone has the content: an image of one colour is put on white, or on
    black if it is light. Raises any of Pillow's errors if the file is damaged or none of FORMATS, and ValueError if its
    header announces too many pixels, and if its values do not use the range of its mode: it would become black.
    """
    image = Image.open(path, formats=FORMATS)
    try:
        return _as_l_or_rgb(image)
    except Exception:
        image.close()
        raise


def _as_l_or_rgb(image: Image.Image) -> Image.Image:
    limit = MAX_JPEG_PIXELS if image.format == 'JPEG' and image.mode in ('RGB', 'L') else MAX_PIXELS
    if math.prod(image.size) > limit:
        raise ValueError(f"its header announces {image.size[0]} x {image.size[1]} pixels, the limit for this format is "
                         f"{limit / 1e6:.0f} million: reduce the image")
    if image.mode in ('RGB', 'L'):
        return image
    if image.mode.startswith(('I', 'F')):                   # 16 bits and more
        pixels = np.asarray(image, 'float64')
        low, high = float(pixels.min()), float(pixels.max())
        if image.mode == 'F':
            white = 1 if high <= 1 else 255
            valid = 0 <= low and high <= white              # false for NaN
        else:
            white = 65535
            valid = 0 <= low and high <= white and (high >= DARKEST_16_BIT or high == 0)
        if not valid:
            raise ValueError(f"its mode is {image.mode} with values from {low:g} to {high:g}, which would become black "
                             "or be cut off: scale them to 0..65535, or save them with 8 bits")
        return Image.fromarray((pixels * (255 / white)).astype('uint8'))
    if 'A' not in image.getbands() and 'transparency' not in image.info:
        return image.convert('RGB')
    image = image.convert('RGBA')
    *colours, alpha = image.getextrema()
    if all(low == high for low, high in colours) and alpha[0] < alpha[1]:         # a shape of one colour
        ground = 255 if sum(low for low, _ in colours) < 3 * 128 else 0
        image = Image.alpha_composite(Image.new('RGBA', image.size, (ground, ground, ground, 255)), image)
    return image.convert('RGB')


def crop_and_resize(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Returns the part `box` of an image from `open_image` as RGB of size x size, with its EXIF orientation applied.

    A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 at which the box still has the size: 3 times as
    fast for an image of 12 megapixels. Only the box is resized. EXIF data that cannot be read are ignored.
    """
    width, height = image.size
    if image.format == 'JPEG':
        smallest = size / (box[2] - box[0]), size / (box[3] - box[1])
        image.draft(None, (max(1, math.ceil(width * smallest[0])), max(1, math.ceil(height * smallest[1]))))
    scale = image.size[0] / width, image.size[1] / height
    box = (box[0] * scale[0], box[1] * scale[1], min(box[2] * scale[0], image.size[0]),
           min(box[3] * scale[1], image.size[1]))
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box).convert('RGB')
    try:
        return ImageOps.exif_transpose(resized)
    except Exception:                      # Pillow raises errors of many types for malformed metadata
        return resized


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
            path, reason = list(self.unreadable.items())[-1]
            raise UserError(f"cannot read {len(self.unreadable)} of {count} images, the last of them {path} ({reason})"
                            ": copy them again, or remove them")
        return self._normalise(images), self.labels[chosen[sources]]
