"""Trains the network of a genotype from scratch on CIFAR-10 or another data set of 32 x 32 images.

    python train.py --arch DARTS_PADDLE                            # CIFAR-10
    python train.py --arch search/genotype.json                    # the result of a search
    python train.py --dataset fashion_mnist_sample --init_channels 8 --layers 5 --epochs 30
    python train.py --resume                                       # continue after a stop or a crash
    python train.py --eval_only --pretrained eval_cifar10/best.npz
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py    # four GPUs
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

import genotypes
import reader
import utils
from engine import distributed, trainer
from engine.checkpoint import Run, read_weights, write_arrays
from engine.console import log
from engine.optimizers import MomentumSGD
from model import Network, NetworkCIFAR
from operations import OPERATIONS


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
    genotype = genotypes.load(args.arch, OPERATIONS)
    pretrained = read_weights(args.pretrained)[1] if args.pretrained else None

    data = distributed.local_rank0_first(lambda: reader.load(args.dataset, args.data))
    args.class_num = utils.check_class_num(args.class_num, data)
    common = dict(mean=data.mean, std=data.std, seed=args.seed, shard=(distributed.rank, distributed.world_size))
    test = reader.Batches(data.test_images, data.test_labels, min(args.batch_size, len(data.test_images)),
                          shuffle=False, **common)
    shape = genotype, args.init_channels, args.class_num, args.layers
    if args.eval_only:
        trainer.set_up(args, place)
        evaluate_weights(NetworkCIFAR(*shape, with_training=False, place=place), pretrained, test, args)
        return

    train = reader.Batches(data.train_images, data.train_labels, args.batch_size, shuffle=True, augment=True,
                           cutout_length=args.cutout_length if args.cutout else 0, drop_last=True, **common)
    run = begin_run(args, genotype, place)
    network = NetworkCIFAR(*shape, auxiliary=args.auxiliary_weight if args.auxiliary else 0.0, seed=args.seed,
                           use_drop_path=args.drop_path_prob > 0, place=place)
    if pretrained:
        network.load_weights(pretrained)
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
        self.metadata = {'genotype': args.genotype, 'dataset': data.name, 'class_names': data.class_names,
                         'mean': data.mean.tolist(), 'std': data.std.tolist()}

    def announce(self) -> None:
        """Logs the size of the network, and prepares its programs."""
        log.info(f"param size = {self.network.param_count / 1e6:.6f}MB")
        log.info(f"multiply-adds = {self.network.multiply_adds / 1e6:.1f}M per image")
        trainer.announce_graph(self.store)

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


def evaluate_weights(network: Network, weights: dict, test, args: argparse.Namespace) -> None:
    """Logs loss and accuracies of the weights {name: array} on the test set: --eval_only."""
    network.load_weights(weights)
    meter = trainer.evaluate(network, test, args)
    log.info(f"{trainer.as_text(meter.means('test'), 'test')} ({meter.images:.0f} images)")


if __name__ == '__main__':
    utils.run(main)
