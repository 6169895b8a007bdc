"""Trains the network of a genotype from scratch on ImageNet.

    python train_imagenet.py --arch DARTS_PADDLE
    python train_imagenet.py --data_dir FOLDER --class_num 10      # custom images, in one of ImageNet's layouts
    python train_imagenet.py --resume                              # continue after a stop or a crash
    python train_imagenet.py --eval_only --pretrained eval_imagenet/best.npz
    python -m paddle.distributed.launch --gpus 0,1,2,3 train_imagenet.py           # four GPUs
"""
from __future__ import annotations

import argparse
import functools

import utils                       # first: it reports a missing package in one line
import imagenet_reader
from engine import distributed, trainer
from engine.workers import Workers
from model import NetworkImageNet
from train import Training, begin_run, evaluate_weights, load_architecture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Train the network of a genotype on ImageNet.")
    add = parser.add_argument
    add('--data_dir', type=utils.path, default='dataset/ILSVRC2012',
        help='folder with train_list.txt and val_list.txt, or with train/<class>/ and val/<class>/ (%(default)s)')
    utils.add_common_arguments(parser, batch_size=128, learning_rate=0.1, weight_decay=3e-5, epochs=250,
                               init_channels=48, layers=14, model_save_dir='eval_imagenet', report_freq=100,
                               class_num=1000)
    add('--decay_rate', type=utils.number(float, 0, open_low=True), default=0.97,
        help='factor of the learning rate per epoch (%(default)s)')
    add('--label_smooth', type=utils.number(float, 0, 1), default=0.1,
        help='fraction of the label that is spread over all classes (%(default)s)')
    utils.add_training_arguments(parser, drop_path_prob=0.0)
    return utils.check_training_arguments(parser, parser.parse_args(argv))


def main() -> None:
    args = parse_args()
    with Workers(args.num_workers) as workers:
        train_or_evaluate(args, workers)


def train_or_evaluate(args: argparse.Namespace, workers: Workers) -> None:
    place = trainer.start(args)
    genotype, pretrained = load_architecture(args, NetworkImageNet)
    data = imagenet_reader.load(args.data_dir, args.class_num)
    make_batches = functools.partial(imagenet_reader.ImageBatches, workers=workers, seed=args.seed,
                                     shard=(distributed.rank, distributed.world_size))
    test = make_batches(data.valid, min(args.batch_size, len(data.valid.paths)), shuffle=False)
    shape = genotype, args.init_channels, args.class_num, args.layers
    if args.eval_only:
        trainer.set_up(args, place)
        evaluate_weights(NetworkImageNet(*shape, with_training=False, place=place), pretrained, data, test, args)
        return

    train = make_batches(data.train, args.batch_size, shuffle=True, augment=True, drop_last=True)
    run = begin_run(args, genotype, place)
    network = NetworkImageNet(*shape, auxiliary=args.auxiliary_weight if args.auxiliary else 0.0, seed=args.seed,
                              label_smooth=args.label_smooth, use_drop_path=args.drop_path_prob > 0, place=place)
    if pretrained:
        pretrained.load_into(network)
    training = Training(args, network, train, test, run, data,
                        learning_rate=lambda epoch: utils.exponential(epoch, args.learning_rate, args.decay_rate))
    training.announce()
    trainer.run_epochs(training, run, args)


if __name__ == '__main__':
    utils.run(main)
