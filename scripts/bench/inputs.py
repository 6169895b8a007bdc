"""The parts of the benchmark that measure the input: images per second of both readers, and the time spent waiting."""
from __future__ import annotations

import os
import statistics
import tempfile

import numpy as np
from PIL import Image, ImageEnhance

import imagenet_reader
import reader
import utils
from engine.workers import Workers
from sides import Side, alternate, medians

IMAGES = 64                                  # of imagenet_input


def cifar_input(args) -> list[dict]:
    """Images per second of the reader of CIFAR, and the percentage of a search that waits for it."""
    data = reader.load('fashion_mnist_sample')                                   # images of CIFAR's size
    batches = reader.Batches(data.train_images, data.train_labels, 64, shuffle=True, augment=True, cutout_length=16,
                             drop_last=True, mean=data.mean, std=data.std, seed=0)
    seconds = alternate({
        'project': lambda: batches.batch(0, 3),
        'peer': lambda: augment_singly(data.train_images[:64], data.mean, data.std, 0)}, args.rounds)
    side = Side('project_waiting')
    return [{'what': 'CIFAR training images, batch 64', 'unit': 'images/s', **per_second(64, **seconds),
             'peer is': 'image by image, numpy'},
            {'what': 'first-order search, batch 16: waiting for input', 'unit': '%', 'project': side.answer['percent']},
            {'what': 'first-order search, batch 16: peak memory', 'unit': 'GB', 'project': side.end()}]


def augment_singly(images: np.ndarray, mean: np.ndarray, std: np.ndarray, seed: int) -> np.ndarray:
    """Returns a batch [N, 3, 32, 32] with CIFAR's augmentation, image by image as a list of transformations does it."""
    rng, batch = np.random.default_rng(seed), []
    mean, std = mean.reshape(3, 1, 1), std.reshape(3, 1, 1)
    for image in images:
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
        top, left = rng.integers(0, 9, 2)
        image = padded[:, top:top + 32, left:left + 32]
        if rng.random() < 0.5:
            image = image[:, :, ::-1]
        image = (image.astype('float32') / 255 - mean) / std
        y, x = rng.integers(0, 32, 2)
        image[:, max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
        batch.append(image)
    return np.stack(batch)


def imagenet_input(args) -> list[dict]:
    """Images per second on one core, from files to normalised batches."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(folder, IMAGES)
        size = statistics.mean(os.path.getsize(path) for path in paths) / 1000
        samples = imagenet_reader.Samples(paths, np.zeros(IMAGES, 'int64'))
        workers = Workers(0)
        train, valid = (imagenet_reader.ImageBatches(samples, IMAGES, workers, seed=0, shuffle=False, augment=augment)
                        for augment in (True, False))
        seconds = alternate({
            'train': lambda: train.batch(0, 0),
            'peer': lambda: np.stack([transform_singly(path, np.random.default_rng([0, number]))
                                      for number, path in enumerate(paths)]),
            'valid': lambda: valid.batch(0, 0)}, args.rounds)
    return [{'what': f'ImageNet training images, one core ({size:.0f} KB each)', 'unit': 'images/s',
             **per_second(IMAGES, project=seconds['train'], peer=seconds['peer']),
             'peer is': 'separate transformations, Pillow'},
            {'what': 'ImageNet validation images, one core', 'unit': 'images/s',
             **per_second(IMAGES, project=seconds['valid'])},
            {'what': 'peak memory of the process with both', 'unit': 'GB', 'project': utils.peak_memory()}]


def per_second(images: int, **seconds: list[float]) -> dict:
    """Returns the fields of a row, images per second, of the seconds that each side took for the images."""
    return medians({name: [images / value for value in rounds] for name, rounds in seconds.items()})


def make_images(folder: str, count: int) -> list[str]:
    """Writes JPEGs of ImageNet's sizes (500 x 375 and similar, about 100 KB) from Fashion-MNIST; returns their paths.

    Noise adds detail to the enlarged images. Detail is what makes photographs slow to decode.
    """
    images = reader.load('fashion_mnist_sample').train_images[:, 0]
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        size = ((500, 375), (375, 500), (500, 333), (640, 480))[number % 4]
        image = np.asarray(Image.fromarray(images[number]).resize(size, Image.Resampling.BICUBIC), 'float32')
        noise = rng.normal(0, 26, (size[1], size[0], 3))
        paths.append(os.path.join(folder, f'{number}.JPEG'))
        Image.fromarray(np.clip(image[:, :, None] + noise, 0, 255).astype('uint8')).save(paths[-1], quality=90)
    return paths


def transform_singly(path: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a training image [3, 224, 224]; every transformation makes a complete image for the next one."""
    image = Image.open(path).convert('RGB')
    image = image.crop(imagenet_reader.random_box(*image.size, rng)).resize((224, 224), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [rng.uniform(0.6, 1.4) for _ in enhance]
    shift = np.uint8(round(255 * rng.uniform(-0.2, 0.2)) % 256)
    for number in rng.permutation(4):
        if number < 3:
            image = enhance[number](image).enhance(factors[number])
        else:
            hue, saturation, value = image.convert('HSV').split()
            image = Image.merge('HSV', (Image.fromarray(np.asarray(hue) + shift), saturation, value)).convert('RGB')
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (imagenet_reader.MEAN, imagenet_reader.STD))
    return (np.asarray(image).transpose(2, 0, 1).astype('float32') / 255 - mean) / std
