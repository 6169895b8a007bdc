"""Trains the network of a genotype from scratch on ImageNet.

    python train_imagenet.py --arch DARTS_PADDLE
    python train_imagenet.py --data_dir FOLDER --class_num 10      # other pictures, in one of ImageNet's layouts
    python train_imagenet.py --resume                              # go on after a stop or a crash
    python train_imagenet.py --eval_only --pretrained eval_imagenet/best.npz
    python -m paddle.distributed.launch --gpus 0,1,2,3 train_imagenet.py           # four GPUs
"""
import functools

import utils                       # first: it quiets what paddle says while it is imported

import distributed
import genotypes
import imagenet_reader
import trainer
from model import NetworkImageNet


def parse_args(argv=None):
    parser = utils.Parser(description="Train the network of a genotype on ImageNet.")
    add = parser.add_argument
    add('--data_dir', default='dataset/ILSVRC2012',
        help='holds train_list.txt and val_list.txt, or train/<class>/ and val/<class>/ (%(default)s)')
    utils.add_common_arguments(parser, batch_size=128, learning_rate=0.1, weight_decay=3e-5, epochs=250,
                               init_channels=48, layers=14, model_save_dir='eval_imagenet', report_freq=100,
                               class_num=1000)
    add('--decay_rate', type=utils.number(float, 0, open_low=True), default=0.97,
        help='of the learning rate, an epoch (%(default)s)')
    add('--label_smooth', type=utils.number(float, 0, 1), default=0.1,
        help='part of the label that is spread over all classes (%(default)s)')
    utils.add_training_arguments(parser, drop_path_prob=0.0)
    return utils.check_training_arguments(parser, parser.parse_args(argv))


def main():
    args = parse_args()
    with imagenet_reader.Workers(args.num_workers) as workers:
        place = trainer.start(args)
        genotype = genotypes.load(args.arch)
        data = imagenet_reader.load(args.data_dir, args.class_num)
        make_batches = functools.partial(imagenet_reader.ImageBatches, workers=workers, seed=args.seed,
                                         part=(distributed.rank, distributed.processes))
        trainer.train_or_evaluate(
            args, place, genotype, data,
            functools.partial(NetworkImageNet, genotype, args.init_channels, args.class_num, args.layers,
                              label_smooth=args.label_smooth),
            train=lambda: make_batches(data.train, args.batch_size, shuffle=True, augment=True, drop_last=True),
            test=lambda: make_batches(data.valid, min(args.batch_size, len(data.valid.paths)), shuffle=False),
            learning_rate=lambda epoch: utils.exponential(epoch, args.learning_rate, args.decay_rate))


if __name__ == '__main__':
    utils.run(main)
