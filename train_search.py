"""Searches a cell by differentiable architecture search (DARTS, arXiv 1806.09055).

    python train_search.py                                         # CIFAR-10, second order
    python train_search.py --unrolled False                        # first order
    python train_search.py --primitives none,skip_connect,sep_conv_3x3 --nodes 3          # another search space
    python train_search.py --dataset fashion_mnist_sample --init_channels 4 --epochs 2    # small, no download
    python train_search.py --dataset folder --data my_images       # custom images, or --dataset npz for arrays
    python train_search.py --resume                                # continue after a stop or a crash
    python -m paddle.distributed.launch --gpus 0,1,2,3 train_search.py                    # four GPUs
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os

import genotypes
import operations
import reader
import utils
from architect import Architect
from engine import distributed, trainer
from engine.checkpoint import Run, read_weights
from engine.console import log
from engine.optimizers import MomentumSGD
from genotypes import SearchSpace
from model_search import Supernet
from utils import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Search a convolutional cell with DARTS.")
    add = parser.add_argument
    reader.add_arguments(parser)
    utils.add_common_arguments(parser, batch_size=64, learning_rate=0.025, weight_decay=3e-4, epochs=50,
                               init_channels=16, layers=8, model_save_dir='search', report_freq=50)
    add('--learning_rate_min', type=utils.number(float, 0), default=0.001,
        help='final learning rate of the weights, at the end of the cosine (%(default)s)')
    add('--train_portion', type=utils.number(float, 0, 1, open_low=True), default=0.5,
        help='fraction of the training images that trains the weights; the rest trains alpha (%(default)s)')
    add('--arch_learning_rate', type=utils.number(float, 0), default=3e-4,
        help="Adam's learning rate of alpha (%(default)s)")
    add('--arch_weight_decay', type=utils.number(float, 0), default=1e-3, help='L2 decay of alpha (%(default)s)')
    add('--unrolled', type=utils.boolean, default=True,
        help='second-order (True) or first-order (False) gradient of alpha (%(default)s)')
    operations.add_arguments(parser)
    add('--stop_at_skips', type=utils.number(int, 1), metavar='N',
        help='number of skip_connect in the normal cell that ends the search; genotype.json is then the last genotype '
             'with fewer (no limit)')
    add('--pretrained', type=utils.path, metavar='PATH', help='initial weights (and alpha) of a supernet, an .npz of '
        'scripts/convert_weights.py')
    args = parser.parse_args(argv)
    if args.stop_at_skips is not None and args.stop_at_skips > 2 * args.nodes:
        parser.error(f"--stop_at_skips {args.stop_at_skips}: a cell of {args.nodes} nodes has {2 * args.nodes} edges")
    return args


class Search:
    """The search, as a task of engine.trainer.run_epochs.

    In every step alpha is updated first, on a train and a random validation batch, then the weights on the train batch
    with the new alpha.
    """

    def __init__(self, args: argparse.Namespace, data: reader.Dataset, run: Run, place):
        self.args, self.run = args, run
        self.space = SearchSpace(args.primitives, args.nodes)
        self.supernet = Supernet(args.init_channels, args.class_num, args.layers, seed=args.seed, place=place,
                                 space=self.space, image_size=data.image_size)
        self.tables = {name: (self.space.edge_names, self.space.primitives) for name in self.supernet.alphas()}
        self.store = self.supernet.store
        self.optimizer = MomentumSGD(self.store, args.momentum, args.weight_decay, args.grad_clip)
        self.architect = Architect(self.supernet, self.optimizer, args.arch_learning_rate, args.arch_weight_decay,
                                   args.unrolled)
        train, valid = reader.split(len(data.train_images), args.train_portion, args.seed)
        common = dict(batch_size=args.batch_size, mean=data.mean, std=data.std, seed=args.seed,
                      shard=(distributed.rank, distributed.world_size))
        self.train = reader.Batches(
            data.train_images, data.train_labels, subset=train, shuffle=True, augment=True,
            cutout_length=args.cutout_length if args.cutout else 0, drop_last=True, **common)
        self.valid = reader.Batches(
            data.train_images, data.train_labels, subset=valid, shuffle=False, drop_last=False, **common)
        self.steps = len(self.train)

    def learning_rate(self, epoch: int) -> float:
        return utils.cosine(epoch, self.args.epochs, self.args.learning_rate, self.args.learning_rate_min)

    def batch(self, epoch: int, step: int) -> tuple:
        return self.train.batch(epoch, step), self.valid.random_batch(epoch, step)

    def train_step(self, batch: tuple, epoch: int, step: int) -> tuple:
        train, valid = (self.supernet.feed(*half) for half in batch)
        lr = self.learning_rate(epoch)
        self.architect.update(train, valid, lr)                         # steps 1 to 6: alpha
        result = self.supernet.run(train)                               # 7: the weights, with the new alpha
        distributed.average_gradients(self.store, 'gradient')
        self.optimizer.step(lr)
        return (*result, len(batch[0][1]))

    def finish_epoch(self, epoch: int) -> dict:
        validation = trainer.evaluate(self.supernet, self.valid, self.args).means('valid')
        weights, genotype = self.supernet.mixing_weights(), self.supernet.genotype()
        for name, table in weights.items():
            log.info(format_mixing_weights(self.space, name, table))
        log.info(f"genotype = {genotype}")
        log.info(f"epoch {epoch + 1}: validation {trainer.as_text(validation, 'valid')}")
        health = {'skip_connects': genotypes.skip_connects(genotype)}
        for name, table in weights.items():
            health[name.replace('alphas', 'entropy')] = genotypes.entropy(table)
        log.info(f"epoch {epoch + 1}: {health['skip_connects']} skip_connect in the normal cell; entropy of alpha: "
                 f"normal {health['entropy_normal']:.4f}, reduce {health['entropy_reduce']:.4f} "
                 f"({math.log(len(self.space.primitives)):.4f} undecided, 0 decided)")
        if not self.too_many_skips(genotype):
            self.run.write('genotype.json', genotypes.dumps(genotype) + '\n')
        return dict(validation, **health, **{name: table.tolist() for name, table in weights.items()},
                    genotype=genotype._asdict(), space=self.space.as_dict())

    def too_many_skips(self, genotype: genotypes.Genotype) -> bool:
        limit = self.args.stop_at_skips
        return limit is not None and genotypes.skip_connects(genotype) >= limit

    def stop_reason(self, record: dict) -> str | None:
        """Returns why --stop_at_skips ends the search after this line of history.jsonl, or None.

        genotype.json is then the last genotype with fewer skip connections, if there is one.
        """
        if self.args.stop_at_skips is None:
            return None
        try:
            found = {line['epoch']: genotypes.check(line['genotype']) for line in [*self.run.history(), record]}
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.run.path('history.jsonl')} has a line without a genotype ({error!r}), which "
                            "--stop_at_skips needs: restore the file, or leave out --stop_at_skips") from None
        if not self.too_many_skips(found[record['epoch']]):
            return None
        reason = (f"the search ended with epoch {record['epoch']}, whose normal cell has "
                  f"{genotypes.skip_connects(found[record['epoch']])} skip_connect (--stop_at_skips "
                  f"{self.args.stop_at_skips}): ")
        fewer = [epoch for epoch, genotype in found.items() if not self.too_many_skips(genotype)]
        path = self.run.path('genotype.json')
        if fewer:
            last = found[fewer[-1]]
            self.run.write('genotype.json', genotypes.dumps(last) + '\n')
            reason += f"{path} is the genotype of epoch {fewer[-1]}, which has {genotypes.skip_connects(last)}"
        else:
            # The file exists when the run was resumed with a lower limit; history.jsonl keeps all genotypes.
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            reason += f"no epoch had fewer, so there is no {path}"
        return reason + "; --resume with a higher limit, or with none, continues the search"


def format_mixing_weights(space: SearchSpace, name: str, table) -> str:
    """Returns mixing weights [edges, primitives] as text, one line per edge."""
    edges = [edge.replace('to', '->') for edge in space.edge_names]
    widths = [max(len(primitive), len('0.1250')) + 2 for primitive in space.primitives]
    lines = [f"mixing weights of {name}"]
    for edge, row in zip(['edge', *edges], [space.primitives, *([f'{weight:.4f}' for weight in row] for row in table)]):
        lines.append(edge.ljust(max(map(len, edges))) + ''.join(map(str.rjust, row, widths)))
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    place = trainer.start(args)
    pretrained = None
    if args.pretrained:
        metadata, pretrained = read_weights(args.pretrained)
        recorded = genotypes.recorded_space(args.pretrained, metadata)
        SearchSpace(args.primitives, args.nodes).check_recorded(args.pretrained, recorded)
    data = distributed.local_rank0_first(lambda: reader.load_for(args))
    run = Run(args)
    trainer.set_up(args, place)
    search = Search(args, data, run, place)
    if pretrained:
        search.supernet.load_weights(pretrained)
    log.info(f"search space: {search.space}")
    log.info(f"param size = {search.supernet.size / 1e6:.6f}MB")
    trainer.announce_graph(search.store, args)
    trainer.run_epochs(search, run, args)


if __name__ == '__main__':
    utils.run(main)
