"""Searches a cell by differentiable architecture search (DARTS, arXiv 1806.09055).

    python train_search.py                                         # CIFAR-10, second order
    python train_search.py --unrolled False                        # first order
    python train_search.py --dataset fashion_mnist_sample --init_channels 4 --epochs 2    # small, no download
    python train_search.py --resume                                # go on after a stop or a crash
    python -m paddle.distributed.launch --gpus 0,1,2,3 train_search.py                    # four GPUs
"""
import contextlib
import os

import numpy as np

import utils                       # first: it quiets what paddle says while it is imported

import distributed
import genotypes
import reader
import trainer
from architect import Architect
from genotypes import PRIMITIVES
from model_search import Supernet
from parameters import MomentumSGD
from trainer import log

CHECKPOINTED = ('theta', 'velocity', 'alphas', 'adam_mean', 'adam_variance')


def parse_args(argv=None):
    parser = utils.Parser(description="Search a convolutional cell with DARTS.")
    add = parser.add_argument
    reader.add_arguments(parser)
    utils.add_common_arguments(parser, batch_size=64, learning_rate=0.025, weight_decay=3e-4, epochs=50,
                               init_channels=16, layers=8, model_save_dir='search', report_freq=50)
    add('--learning_rate_min', type=utils.number(float, 0), default=0.001,
        help='of the weights, at the end of the cosine (%(default)s)')
    add('--train_portion', type=utils.number(float, 0, 1, open_low=True), default=0.5,
        help='part of the training images that trains the weights; the rest trains alpha (%(default)s)')
    add('--arch_learning_rate', type=utils.number(float, 0), default=3e-4, help="Adam's, of alpha (%(default)s)")
    add('--arch_weight_decay', type=utils.number(float, 0), default=1e-3, help='of alpha (%(default)s)')
    add('--unrolled', type=utils.boolean, default=True,
        help='second order (True) or first order (False) gradient of alpha (%(default)s)')
    add('--stop_at_skips', type=utils.number(int, 1, 2 * genotypes.NODES), metavar='N',
        help='end the search when the normal cell has N skip_connect or more, with the last genotype that has fewer')
    add('--pretrained', metavar='PATH', help="start with these weights (and alpha) of a supernet, an .npz of "
        "scripts/convert_weights.py")
    return parser.parse_args(argv)


class Search:
    """The search as a task of trainer.run_epochs."""

    def __init__(self, args, data, run, place):
        self.args, self.run = args, run
        self.supernet = Supernet(args.init_channels, args.class_num, args.layers, seed=args.seed, place=place)
        self.optimizer = MomentumSGD(self.supernet.store, args.momentum, args.weight_decay, args.grad_clip)
        self.architect = Architect(self.supernet, self.optimizer, args.arch_learning_rate,
                                   args.arch_weight_decay, args.unrolled)
        train, valid = reader.split(len(data.train_images), args.train_portion, args.seed)
        common = dict(batch_size=args.batch_size, mean=data.mean, std=data.std, seed=args.seed,
                      part=(distributed.rank, distributed.processes))
        self.train = reader.Batches(
            data.train_images[train], data.train_labels[train], shuffle=True, augment=True,
            cutout_length=args.cutout_length if args.cutout else 0, drop_last=True, **common)
        self.valid = reader.Batches(
            data.train_images[valid], data.train_labels[valid], shuffle=False, drop_last=False, **common)
        self.steps = len(self.train)

    def learning_rate(self, epoch):
        return utils.cosine(epoch, self.args.epochs, self.args.learning_rate, self.args.learning_rate_min)

    def batch(self, epoch, step):
        return self.train.batch(epoch, step), self.valid.random_batch(epoch, step)

    def train_step(self, batch, epoch, step):
        train, valid = (self.supernet.feed(*half) for half in batch)
        lr = self.learning_rate(epoch)
        self.architect.update(train, valid, lr)          # steps 1 to 6: alpha
        result = self.supernet.run(train)                # 7: the weights, with the new alpha
        distributed.average(self.supernet.store, 'gradient')
        self.optimizer.step(lr)
        return (*result, len(batch[0][1]))

    def finish_epoch(self, epoch):
        validation = trainer.evaluate(self.supernet, self.valid, self.args).means('valid')
        weights, genotype = self.supernet.mixing_weights(), self.supernet.genotype()
        for name, table in weights.items():
            log.info(format_mixing_weights(name, table))
        log.info(f"genotype = {genotype}")
        log.info(f"epoch {epoch + 1}: validation {trainer.as_text(validation, 'valid')}")
        health = {'skip_connects': genotypes.skip_connects(genotype)}
        for name, table in weights.items():
            health[name.replace('alphas', 'entropy')] = genotypes.entropy(table)
        log.info(f"epoch {epoch + 1}: {health['skip_connects']} skip_connect in the normal cell; entropy of alpha: "
                 f"normal {health['entropy_normal']:.4f}, reduce {health['entropy_reduce']:.4f} "
                 f"(2.0794 undecided, 0 decided)")
        if not self.too_many_skips(genotype):
            self.run.write('genotype.json', genotypes.dumps(genotype) + '\n')
        return dict(validation, **health, **{name: table.tolist() for name, table in weights.items()},
                    genotype=genotype._asdict())

    def too_many_skips(self, genotype):
        return self.args.stop_at_skips is not None and genotypes.skip_connects(genotype) >= self.args.stop_at_skips

    def over(self, record):
        """With --stop_at_skips: sees to it that genotype.json is the last genotype with fewer, if there is one."""
        found = {each['epoch']: genotypes.check(each['genotype']) for each in [*self.run.history(), record]}
        if not self.too_many_skips(found[record['epoch']]):
            return None
        why = (f"the search ended with epoch {record['epoch']}, whose normal cell has "
               f"{genotypes.skip_connects(found[record['epoch']])} skip_connect (--stop_at_skips "
               f"{self.args.stop_at_skips}): ")
        fewer = [epoch for epoch, genotype in found.items() if not self.too_many_skips(genotype)]
        path = self.run.path('genotype.json')
        if fewer:
            last = found[fewer[-1]]
            self.run.write('genotype.json', genotypes.dumps(last) + '\n')
            why += f"{path} is the genotype of epoch {fewer[-1]}, which has {genotypes.skip_connects(last)}"
        else:
            # It is there when the run was resumed with a lower limit; history.jsonl keeps all.
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            why += f"no epoch had fewer, so there is no {path}"
        return why + "; with a higher limit, or none, --resume goes on"

    def state(self):
        state = {name: self.supernet.store.get(name) for name in CHECKPOINTED}
        return dict(state, adam_steps=np.array(self.architect.steps))

    def load_state(self, state):
        for name in CHECKPOINTED:
            self.supernet.store.set(name, state[name])
        self.architect.steps = int(state['adam_steps'])


def format_mixing_weights(name, table):
    """A table [14, 8] of softmax(alpha) with a line an edge."""
    lines = [f"softmax of {name}", 'edge    ' + ''.join(f'{op:>14}' for op in PRIMITIVES)]
    for node, first in enumerate(genotypes.FIRST_EDGE):
        for state in range(2 + node):
            lines.append(f'{state} -> {2 + node}  ' + ''.join(f'{w:14.4f}' for w in table[first + state]))
    return '\n'.join(lines)


def main():
    args = parse_args()
    place = trainer.start(args)
    data = distributed.one_then_all(lambda: reader.load(args.dataset, args.data))
    args.class_num = utils.check_class_num(args.class_num, data)
    run = trainer.Run(args)
    trainer.set_up(args, place)
    search = Search(args, data, run, place)
    if args.pretrained:
        search.supernet.load_weights(trainer.read_weights(args.pretrained)[1])
    log.info(f"param size = {search.supernet.size / 1e6:.6f}MB")
    trainer.announce_graph(search.supernet.store)
    trainer.run_epochs(search, run, args)


if __name__ == '__main__':
    utils.run(main)
