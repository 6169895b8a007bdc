"""Trains the network of a genotype from scratch on CIFAR-10, another data set in memory, or custom data.

    python train.py --arch DARTS_PADDLE                            # CIFAR-10
    python train.py --arch search/genotype.json                    # the result of a search
    python train.py --dataset fashion_mnist_sample --init_channels 8 --layers 5 --epochs 30
    python train.py --dataset folder --data my_images              # custom images, or --dataset npz for arrays
    python train.py --resume                                       # continue after a stop or a crash
    python train.py --eval_only --pretrained eval_cifar10/best.npz
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py    # four GPUs
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import utils                       # first: it reports a missing package in one line
import numpy as np

import genotypes
import reader
from engine import distributed, trainer
from engine.checkpoint import Run, read_weights, write_arrays
from engine.console import log
from engine.optimizers import MomentumSGD
from imagenet_reader import find_folders
from model import Network, NetworkCIFAR, NetworkImageNet, shape_of
from operations import OPERATIONS
from utils import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Train the network of a genotype on CIFAR-10.")
    reader.add_arguments(parser)
    utils.add_common_arguments(parser, batch_size=96, learning_rate=0.025, weight_decay=3e-4, epochs=600,
                               init_channels=36, layers=20, model_save_dir='eval_cifar10', report_freq=50)
    utils.add_training_arguments(parser, drop_path_prob=0.2)
    return utils.check_training_arguments(parser, parser.parse_args(argv))


def main() -> None:
    args = parse_args()
    place = trainer.start(args)
    genotype, pretrained = load_architecture(args, NetworkCIFAR)
    data = distributed.local_rank0_first(lambda: reader.load_for(args))
    if args.eval_only:
        data = pretrained.normalisation_of(data)
    common = dict(mean=data.mean, std=data.std, seed=args.seed, shard=(distributed.rank, distributed.world_size))
    test = reader.Batches(data.test_images, data.test_labels, min(args.batch_size, len(data.test_images)),
                          shuffle=False, **common)
    shape = genotype, args.init_channels, args.class_num, args.layers
    if args.eval_only:
        trainer.set_up(args, place)
        evaluate_weights(NetworkCIFAR(*shape, with_training=False, place=place, image_size=data.image_size),
                         pretrained, data, test, args)
        return

    train = reader.Batches(data.train_images, data.train_labels, args.batch_size, shuffle=True, augment=True,
                           cutout_length=args.cutout_length if args.cutout else 0, drop_last=True, **common)
    run = begin_run(args, genotype, place)
    network = NetworkCIFAR(*shape, auxiliary=args.auxiliary_weight if args.auxiliary else 0.0, seed=args.seed,
                           use_drop_path=args.drop_path_prob > 0, place=place, image_size=data.image_size)
    if pretrained:
        pretrained.load_into(network)
    training = Training(args, network, train, test, run, data,
                        learning_rate=lambda epoch: utils.cosine(epoch, args.epochs, args.learning_rate))
    training.announce()
    trainer.run_epochs(training, run, args)


class Training:
    """The training of a discrete network, as a task of engine.trainer.run_epochs; train_imagenet.py uses it too.

    train, test: batches of the training and of the test set, as reader.Batches; learning_rate: a function of the epoch.
    best.npz holds the weights of the epoch with the best accuracy on the test set, as in the DARTS code: that accuracy
    is selected on the test set.
    """

    def __init__(self, args: argparse.Namespace, network: Network, train, test, run: Run, data,
                 learning_rate: Callable[[int], float]):
        self.args, self.network, self.store = args, network, network.store
        self.test, self.run, self.learning_rate = test, run, learning_rate
        self.optimizer = MomentumSGD(self.store, args.momentum, args.weight_decay, args.grad_clip)
        self.steps, self.batch = len(train), train.batch
        self.store.host_state['best_top1'] = -1.0
        self.metadata = {'genotype': args.genotype, 'init_channels': args.init_channels, 'layers': args.layers,
                         'class_num': args.class_num, 'image_size': network.image_size,
                         'padding': getattr(data, 'padding', 0), 'split': getattr(data, 'split', None),
                         'data_checksum': getattr(data, 'checksum', None), 'dataset': data.name,
                         'class_names': data.class_names, 'mean': data.mean.tolist(), 'std': data.std.tolist()}

    def announce(self) -> None:
        """Logs the size of the network, and prepares its programs."""
        log.info(f"param size = {self.network.param_count / 1e6:.6f}MB")
        log.info(f"multiply-adds = {self.network.multiply_adds / 1e6:.1f}M per image")
        trainer.announce_graph(self.store, self.args)

    def drop_path_prob(self, epoch: int) -> float:
        """Returns the probability of dropping an edge, which rises linearly from 0 over the epochs."""
        return self.args.drop_path_prob * epoch / self.args.epochs

    def train_step(self, batch: tuple, epoch: int, step: int) -> tuple:
        # Masks differ between ranks; rank 0 draws those of a run of one process.
        key = [self.args.seed, reader.DROP_PATH, epoch, step] + [distributed.rank] * (not distributed.is_main)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        result = self.network.run(self.network.feed(*batch), self.drop_path_prob(epoch), seed)
        distributed.average_gradients(self.store, 'gradient', 'statistics')
        self.optimizer.step(self.learning_rate(epoch))
        return (*result, len(batch[0]))

    def finish_epoch(self, epoch: int) -> dict:
        result = trainer.evaluate(self.network, self.test, self.args).means('test')
        names = ['last.npz']
        if result['test_top1'] > self.store.host_state['best_top1']:
            self.store.host_state['best_top1'] = result['test_top1']
            names.append('best.npz')
        for name in names:
            self.run.write(name, lambda file: write_arrays(file, self.metadata, self.network.weights()))
        best = self.store.host_state['best_top1']
        log.info(f"epoch {epoch + 1}: test {trainer.as_text(result, 'test')}, best top-1 {100 * best:.2f} %")
        return dict(result, best_top1=best, drop_path_prob=self.drop_path_prob(epoch))


def begin_run(args: argparse.Namespace, genotype: genotypes.Genotype, place) -> Run:
    """Opens the folder of a training and sets up the device."""
    args.genotype = json.loads(genotypes.dumps(genotype))        # the file of --arch may change before a resume
    run = Run(args)
    trainer.set_up(args, place)
    return run


class Pretrained(NamedTuple):
    """The content of a file of weights: --pretrained."""
    path: str
    metadata: dict
    weights: dict[str, np.ndarray]

    def normalisation_of(self, data):
        """Returns a data set with the normalisation of the images that trained the weights."""
        return data._replace(**{name: np.array(self.metadata[name], 'float32') for name in ('mean', 'std')
                                if self.metadata.get(name)})

    def check_data(self, data) -> None:
        """Raises UserError when the weights are for other classes or sizes of images than those of the data set."""
        names, count = self.metadata.get('class_names'), shape_of(self.weights).class_num
        size, found = self.metadata.get('image_size'), getattr(data, 'image_size', None)
        if size and found and size != found:
            raise UserError(f"{self.path} is for images of {size} x {size}, {data.name} has {found} x {found}")
        if self.metadata.get('split') and self.metadata.get('data_checksum') != data.checksum:
            log.warning(f"the images are not those that {self.path} was trained with: as the test set was drawn from "
                        "them, it may have images that trained the weights")
        if count != data.class_num:
            raise UserError(f"{self.path} is for {count} classes, {data.name} has {data.class_num}")
        if names and data.class_names and list(names) != list(data.class_names):
            pair = next((pair for pair in zip(names, data.class_names) if pair[0] != pair[1]), ('more names', 'fewer'))
            raise UserError(f"{self.path} is for other classes than those of {data.name}: {pair[0]!r} there, "
                            f"{pair[1]!r} here")

    def load_into(self, network: Network) -> None:
        """Sets the weights of a network; its classifiers keep theirs when it has another number of classes."""
        count = shape_of(self.weights).class_num
        if count != network.classes:
            log.info(f"{self.path} is for {count} classes: all its weights but those of the classifiers are loaded")
        network.load_weights(self.weights, classifiers=count == network.classes)


def load_architecture(args: argparse.Namespace, kind: type[Network]) -> tuple[genotypes.Genotype, Pretrained | None]:
    """Returns the genotype to train or to evaluate, and the content of --pretrained, or None without it.

    With --pretrained the genotype, init_channels and layers are those of the file, with --eval_only also the data set,
    its split and the size of its images: they are set in args. Raises UserError when a flag contradicts the file.
    """
    given = vars(args).pop('given')
    if not args.pretrained:
        return genotypes.load(args.arch, OPERATIONS), None
    metadata, weights = read_weights(args.pretrained)
    genotype = genotypes.of_weights(args.pretrained, metadata, args.arch if 'arch' in given else None, OPERATIONS)
    try:
        shape = shape_of(weights)
    except UserError as error:
        raise UserError(f"{args.pretrained} does not hold the weights of a network: {error}") from None
    if shape.kind is not kind:
        script = 'train_imagenet.py' if shape.kind is NetworkImageNet else 'train.py'
        raise UserError(f"{args.pretrained} holds the weights of a {shape.kind.__name__}: use {script}")
    sizes = {'init_channels': shape.init_channels, 'layers': shape.layers}
    if args.eval_only and kind is NetworkImageNet:         # the other data sets have their own number
        sizes['class_num'] = shape.class_num
    if args.eval_only and kind is NetworkCIFAR and metadata.get('dataset') in (*reader.DATASETS, *reader.CUSTOM) \
            and 'dataset' not in given:
        args.dataset = metadata['dataset']
    if getattr(args, 'dataset', None) == 'folder':
        if metadata.get('image_size') and (args.eval_only or 'image_size' not in given):
            sizes['image_size'] = metadata['image_size']
        # In another split the test set would have images that trained the weights.
        if args.eval_only and metadata.get('split') and not all(find_folders(args.data or '.')):
            sizes.update(metadata['split'])
        elif metadata.get('split') and metadata['split'].get('seed') != args.seed and not args.eval_only:
            log.warning(f"{args.pretrained} was trained on another split, by seed {metadata['split'].get('seed')}: if "
                        "the images are the same, the test set has images that trained the weights")
    for name, value in sizes.items():
        if name in given and getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} contradicts {args.pretrained}, which has {value}: "
                            f"leave out --{name}")
        setattr(args, name, value)
    return genotype, Pretrained(args.pretrained, metadata, weights)


def evaluate_weights(network: Network, pretrained: Pretrained, data, test, args: argparse.Namespace) -> None:
    """Logs loss and accuracies of weights on the test set of a data set: --eval_only."""
    pretrained.check_data(data)
    network.load_weights(pretrained.weights)
    meter = trainer.evaluate(network, test, args)
    log.info(f"{trainer.as_text(meter.means('test'), 'test')} ({meter.images:.0f} images)")


if __name__ == '__main__':
    utils.run(main)
