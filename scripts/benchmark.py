"""Measures this project against a peer, both in turns in the same run: medians and ratios.

    python scripts/benchmark.py                            # all parts
    python scripts/benchmark.py imagenet_input --rounds 9 --json
"""
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils                       # before paddle: it quiets what paddle says while it is imported

import numpy as np
from PIL import Image, ImageEnhance

import imagenet_reader
import reader


def alternate(functions, rounds):
    """{name: median seconds of a call} of {name: function}, called in turns after one call each to warm up."""
    seconds = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


# ---------------------------------------------------------------------------------------------------
# ImageNet input

def make_pictures(folder, count):
    """JPEGs as large as ImageNet's (500 x 375 and the like, about 100 KB) out of Fashion-MNIST, -> paths.

    Noise gives the enlarged pictures what makes photographs slow to decode: detail.
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


def separate_steps(path, rng):
    """The training picture as a list of transformations makes it, each on the whole result of the one before."""
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
    pixels = np.asarray(image).transpose(2, 0, 1).astype('float32') / 255
    return (pixels - np.float32(imagenet_reader.MEAN).reshape(3, 1, 1)) / np.float32(imagenet_reader.STD).reshape(3, 1, 1)


def imagenet_input(rounds):
    """Images per second on one core, from files to normalised batches."""
    count = 64
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(folder, count)
        size = statistics.mean(os.path.getsize(path) for path in paths) / 1000
        samples = imagenet_reader.Samples(paths, np.zeros(count, 'int64'))
        workers = imagenet_reader.Workers(0)
        train, valid = (imagenet_reader.ImageBatches(samples, count, workers, seed=0, shuffle=False, augment=augment)
                        for augment in (True, False))
        seconds = alternate({
            'train': lambda: train.batch(0, 0),
            'peer': lambda: np.stack([separate_steps(path, np.random.default_rng([0, number]))
                                      for number, path in enumerate(paths)]),
            'valid': lambda: valid.batch(0, 0)}, rounds)
    return [
        {'what': f'ImageNet training pictures, one core ({size:.0f} KB each)', 'unit': 'images/s',
         'ours': count / seconds['train'], 'peer': count / seconds['peer'], 'peer is': 'separate steps, Pillow',
         'ratio': seconds['train'] / seconds['peer']},
        {'what': 'ImageNet validation pictures, one core', 'unit': 'images/s', 'ours': count / seconds['valid']}]


PARTS = {'imagenet_input': imagenet_input}


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', metavar='part', help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument('--rounds', type=utils.number(int, 1), default=7, help='timed calls of each (%(default)s)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: there are {', '.join(PARTS)}")
    rows = []
    for name in args.parts or PARTS:
        print(f"measuring {name}", file=sys.stderr)
        rows += PARTS[name](args.rounds)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':60}{'ours':>10}{'peer':>10}  {'unit':10}time, ours / peer")
    for row in rows:
        peer = f"{row['peer']:10.1f}" if 'peer' in row else f"{'':10}"
        ratio = f"{row['ratio']:.2f} ({row['peer is']})" if 'ratio' in row else ''
        print(f"{row['what']:60}{row['ours']:10.1f}{peer}  {row['unit']:10}{ratio}")


if __name__ == '__main__':
    utils.run(main)
