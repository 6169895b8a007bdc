"""Exports a trained network for inference: Paddle's format, ordinary named weights, any number of images.

    python scripts/export_model.py --pretrained eval_cifar10/best.npz --out exported
    python scripts/export_model.py --arch DARTS_V2 --pretrained converted.npz --dataset cifar10 --out exported

--out gets model.pdiparams and the program beside it (model.json, on Paddle 2 model.pdmodel), which read images
[N, 3, H, W] and give logits [N, classes], and classifier.json: how a picture becomes such an image, and
the names of the classes. scripts/predict.py uses all three.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import engine  # noqa: F401  before paddle

import numpy as np
import paddle

import imagenet_reader
import reader
import genotypes
from engine import checkpoint
from model import NetworkImageNet, network_of
from predict import DESCRIPTION, PROGRAM, Predictor
import utils
from utils import UserError

TOLERANCE = 1e-4                            # of logits, relative to the largest of them


def describe(network, about, dataset, class_names):
    """How a picture becomes an image for the network, and what its classes are called."""
    classes = network.classes
    if isinstance(network, NetworkImageNet):
        known = {'mean': imagenet_reader.MEAN, 'std': imagenet_reader.STD, 'class_names': None}
        input_ = {'size': imagenet_reader.SIZE, 'short_side': imagenet_reader.SHORT_SIDE, 'padding': 0}
    else:
        source = reader.DATASETS.get(dataset or about.get('dataset'), reader.DATASETS['cifar10'])
        known = {'mean': source.mean, 'std': source.std, 'class_names': source.class_names}
        padding = reader.IDX_PADDING if isinstance(source, reader.Idx) else 0
        input_ = {'size': reader.IMAGE_SIZE, 'short_side': reader.IMAGE_SIZE - 2 * padding, 'padding': padding}
    if not dataset:
        known.update((key, about[key]) for key in known if about.get(key))
    if class_names:
        known['class_names'] = class_names
    if known['class_names'] and len(known['class_names']) != classes:
        raise UserError(f"there are {len(known['class_names'])} names of classes, but the network has {classes} "
                        "classes: give --dataset or --class_names")
    return {**input_, **known, 'paddle': paddle.__version__}


def read_class_names(path):
    try:
        with open(path, encoding='utf-8') as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def check(network, folder):
    """The largest difference of logits between the exported network and the program that was trained.

    Raises UserError when it is more than rounding.
    """
    predictor, rng, worst = Predictor(folder), np.random.default_rng(0), 0.0
    for count in (1, 3):
        images = rng.normal(size=(count, 3, network.image_size, network.image_size)).astype('float32')
        expected, found = network.logits(images), predictor.logits(images)
        difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        if not difference <= TOLERANCE:
            raise UserError(f"the exported network differs from the trained one: logits by {difference:.1e} of their "
                            "size; please report this")
        worst = max(worst, difference)
    return worst


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--arch', help='the genotype: a name in genotypes.py or a genotype.json (what the weights were trained with)')
    add('--pretrained', required=True, metavar='PATH', help='the weights, an .npz of a training or a conversion')
    add('--out', required=True, metavar='DIR', help='folder for the exported model')
    add('--dataset', choices=sorted(reader.DATASETS),
        help='whose normalisation and class names apply, where the weights do not tell (cifar10)')
    add('--class_names', metavar='FILE', help='a line for each class (those of the data set)')
    args = parser.parse_args()

    about, weights = checkpoint.read_weights(args.pretrained)
    genotype = genotypes.of_weights(args.pretrained, about, args.arch)
    try:
        network = network_of(genotype, weights, with_training=False)
    except UserError as error:
        raise UserError(f"{args.pretrained} does not fit {args.arch or 'its genotype'}: {error}") from None
    names = read_class_names(args.class_names) if args.class_names else None
    description = describe(network, about, args.dataset, names)
    try:
        os.makedirs(args.out, exist_ok=True)
        network.export(os.path.join(args.out, PROGRAM))
        utils.write_file(os.path.join(args.out, DESCRIPTION), json.dumps(description, indent=2))
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from None
    difference = check(network, args.out)
    print(f"{args.out}: logits as those of the trained network (largest difference {difference:.1e})")


if __name__ == '__main__':
    utils.run(main)
