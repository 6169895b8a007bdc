"""Writes dataset/fashion_mnist_sample: the first images of each class of Fashion-MNIST, in its file format.

    python scripts/dev/make_sample.py --source FOLDER      # folder with the four original files
"""
from __future__ import annotations

import gzip
import os
import struct
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import custom_reader
import reader
import utils


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the first `count` images of each class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))


def write_idx(path: str, array: np.ndarray) -> None:
    """Writes an array of bytes as a gzipped IDX file; equal arrays give equal files."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
    with open(path, 'wb') as file, gzip.GzipFile('', 'wb', 9, file, mtime=0) as packed:
        packed.write(header + array.tobytes())


def make(source: str, target: str, train: int, test: int) -> None:
    """Writes the first `train` and `test` images per class of the four files in `source` to `target`."""
    os.makedirs(target, exist_ok=True)
    for half, count in (('train', train), ('t10k', test)):
        names = [f'{half}-images-idx3-ubyte.gz', f'{half}-labels-idx1-ubyte.gz']
        images, labels = (custom_reader.read_idx(os.path.join(source, name), n) for name, n in zip(names, (3, 1)))
        chosen = first_of_each_class(labels, count)
        for name, array in zip(names, (images, labels)):
            write_idx(os.path.join(target, name), array[chosen])


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--source', default='/usr/share/datasets/fashion-mnist',
                        help='folder with the four original files (%(default)s, of the Debian package)')
    make(parser.parse_args().source, reader.default_folder('fashion_mnist_sample'), train=200, test=50)


if __name__ == '__main__':
    utils.run(main)
