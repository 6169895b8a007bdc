"""Trains the network of a genotype from scratch on CIFAR-10 or another data set of 32 x 32 pictures.

    python train.py --arch DARTS_PADDLE                            # CIFAR-10
    python train.py --arch search/genotype.json                    # what a search found
    python train.py --dataset fashion_mnist_sample --init_channels 8 --layers 5 --epochs 30
    python train.py --resume                                       # go on after a stop or a crash
    python train.py --eval_only --pretrained eval_cifar10/best.npz
    python -m paddle.distributed.launch --gpus 0,1,2,3 train.py    # four GPUs
"""
import functools

import utils                       # first: it quiets what paddle says while it is imported

import distributed
import genotypes
import reader
import trainer
from model import NetworkCIFAR


def parse_args(argv=None):
    parser = utils.Parser(description="Train the network of a genotype on CIFAR-10.")
    reader.add_arguments(parser)
    utils.add_common_arguments(parser, batch_size=96, learning_rate=0.025, weight_decay=3e-4, epochs=600,
                               init_channels=36, layers=20, model_save_dir='eval_cifar10', report_freq=50)
    utils.add_training_arguments(parser, drop_path_prob=0.2)
    return utils.check_training_arguments(parser, parser.parse_args(argv))


def main():
    args = parse_args()
    place = trainer.start(args)
    genotype = genotypes.load(args.arch)
    data = distributed.one_then_all(lambda: reader.load(args.dataset, args.data))
    args.class_num = utils.check_class_num(args.class_num, data)
    common = dict(mean=data.mean, std=data.std, seed=args.seed, part=(distributed.rank, distributed.processes))
    trainer.train_or_evaluate(
        args, place, genotype, data,
        functools.partial(NetworkCIFAR, genotype, args.init_channels, args.class_num, args.layers),
        train=lambda: reader.Batches(
            data.train_images, data.train_labels, args.batch_size, shuffle=True, augment=True,
            cutout_length=args.cutout_length if args.cutout else 0, drop_last=True, **common),
        test=lambda: reader.Batches(
            data.test_images, data.test_labels, min(args.batch_size, len(data.test_images)), shuffle=False, **common),
        learning_rate=lambda epoch: utils.cosine(epoch, args.epochs, args.learning_rate))


if __name__ == '__main__':
    utils.run(main)
