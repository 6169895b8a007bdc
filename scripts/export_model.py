"""Exports a trained network for inference: Paddle's format, ordinary named weights, any number of images.

    python scripts/export_model.py --pretrained eval_cifar10/best.npz --out exported
    python scripts/export_model.py --arch DARTS_V2 --pretrained converted.npz --dataset cifar10 --out exported

Writes to --out the program (model.json; with Paddle 2 model.pdmodel) and its weights (model.pdiparams), which map
images [N, 3, H, W] to logits [N, classes], and classifier.json: the preprocessing of an image file and the names of the
classes. scripts/predict.py reads all three.
"""
from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import engine  # noqa: F401  before paddle
import numpy as np
import paddle

import genotypes
import imagenet_reader
import reader
import utils
from engine import checkpoint
from model import Network, NetworkImageNet, network_of
from operations import OPERATIONS
from predict import DESCRIPTION, PROGRAM, Predictor
from utils import UserError

TOLERANCE = 1e-4                            # of logits, relative to the largest of them


def describe(network: Network, metadata: dict, dataset: str | None, class_names: list[str] | None) -> dict:
    """Returns the content of classifier.json: preprocessing of an image file, names of the classes, version of Paddle.

    metadata: of the weight file. dataset: a name in reader.DATASETS; its normalisation and class names replace those of
    the metadata. class_names replaces both. Raises UserError when the number of names is not that of the classes.
    """
    if isinstance(network, NetworkImageNet):
        known = {'mean': imagenet_reader.MEAN, 'std': imagenet_reader.STD, 'class_names': None}
        sizes = {'size': imagenet_reader.SIZE, 'short_side': imagenet_reader.SHORT_SIDE, 'padding': 0}
    else:
        name = dataset or metadata.get('dataset')
        source = reader.DATASETS.get(name, reader.DATASETS['cifar10'])
        known = {'mean': source.mean, 'std': source.std, 'class_names': source.class_names}
        padding = reader.IDX_PADDING if isinstance(source, reader.Idx) else 0      # where it is not recorded
        padding = padding if dataset else metadata.get('padding', padding)
        sizes = {'size': network.image_size, 'short_side': network.image_size - 2 * padding, 'padding': padding}
        if name in reader.CUSTOM:
            known['class_names'] = None
    if not dataset:
        known.update((key, metadata[key]) for key in known if metadata.get(key))
    if class_names:
        known['class_names'] = class_names
    if known['class_names'] and len(known['class_names']) != network.classes:
        raise UserError(f"there are {len(known['class_names'])} names of classes, but the network has "
                        f"{network.classes} classes: give --dataset or --class_names")
    return {**sizes, **known, 'paddle': paddle.__version__}


def read_class_names(path: str) -> list[str]:
    """Returns the lines of a text file that are not empty; raises UserError when it cannot be read."""
    return [line.strip() for line in utils.read_text(path).splitlines() if line.strip()]


def check(network: Network, folder: str) -> float:
    """Returns the largest difference between logits of the network and of its export, relative to the largest logit.

    Raises UserError when it exceeds TOLERANCE.
    """
    predictor, rng, worst = Predictor(folder), np.random.default_rng(0), 0.0
    for count in (1, 3):
        images = rng.normal(size=(count, 3, network.image_size, network.image_size)).astype('float32')
        expected, found = network.logits(images), predictor.logits(images)
        difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        if not difference <= TOLERANCE:
            raise UserError(f"the exported network differs from the trained one: logits by {difference:.1e} of the "
                            "largest; please report this")
        worst = max(worst, difference)
    return worst


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--arch', type=utils.path, help='genotype, as of train.py (that of the weight file)')
    add('--pretrained', type=utils.path, required=True, metavar='PATH',
        help='weights, an .npz of a training or a conversion')
    add('--out', type=utils.path, required=True, metavar='DIR', help='folder for the exported model')
    add('--dataset', choices=sorted(reader.DATASETS),
        help='data set whose normalisation and class names apply (that of the weight file, otherwise cifar10)')
    add('--class_names', type=utils.path, metavar='FILE',
        help='text file with one class name per line (the names of the data set)')
    args = parser.parse_args()

    metadata, weights = checkpoint.read_weights(args.pretrained)
    genotype = genotypes.of_weights(args.pretrained, metadata, args.arch, OPERATIONS)
    try:
        network = network_of(genotype, weights, with_training=False, image_size=metadata.get('image_size'))
    except UserError as error:
        raise UserError(f"{args.pretrained} does not fit {args.arch or 'its genotype'}: {error}") from None
    names = read_class_names(args.class_names) if args.class_names else None
    description = describe(network, metadata, args.dataset, names)
    try:
        os.makedirs(args.out, exist_ok=True)
        network.export(os.path.join(args.out, PROGRAM))
        utils.write_file(os.path.join(args.out, DESCRIPTION), json.dumps(description, indent=2))
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from None
    difference = check(network, args.out)
    print(f"{args.out}: logits equal those of the trained network (largest difference {difference:.1e})")


if __name__ == '__main__':
    utils.run(main)
