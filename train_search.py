"""Searches a cell by differentiable architecture search (DARTS, arXiv 1806.09055).

    python train_search.py                                         # CIFAR-10, second order
    python train_search.py --unrolled False                        # first order
    python train_search.py --primitives none,skip_connect,sep_conv_3x3 --nodes 3          # another search space
    python train_search.py --dataset fashion_mnist_sample --init_channels 4 --epochs 2    # small, no download
    python train_search.py --dataset folder --data my_images       # custom images, or --dataset npz for arrays
    python train_search.py --curvature_freq 1 --stop_at_curvature 1.3                     # end before a collapse
    python train_search.py --resume                                # continue after a stop or a crash
    python -m paddle.distributed.launch --gpus 0,1,2,3 train_search.py                    # four GPUs
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import time

import numpy as np

import genotypes
import operations
import reader
import utils
from architect import CURVATURE_LIMIT, Architect
from engine import distributed, trainer
from engine.checkpoint import Run, read_weights
from engine.console import Progress, log
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
    add('--curvature_freq', type=utils.number(int, 1), metavar='N',
        help='epochs between evaluations of the curvature, the dominant eigenvalue of the Hessian of the validation '
             'loss with respect to alpha, each as long as a few steps (no evaluation)')
    add('--stop_at_curvature', type=utils.number(float, 1, open_low=True), metavar='FACTOR',
        help='ratio, such as 1.3, of the mean of the last five evaluations of the curvature to that four evaluations '
             'earlier above which the search ends, from epoch 10 on; genotype.json is then the genotype of the earlier '
             'evaluation (no limit)')
    add('--pretrained', type=utils.path, metavar='PATH', help='initial weights (and alpha) of a supernet, an .npz of '
        'scripts/convert_weights.py')
    args = parser.parse_args(argv)
    if args.stop_at_skips is not None and args.stop_at_skips > 2 * args.nodes:
        parser.error(f"--stop_at_skips {args.stop_at_skips}: a cell of {args.nodes} nodes has {2 * args.nodes} edges")
    if args.stop_at_curvature is not None and args.curvature_freq is None:
        parser.error("--stop_at_curvature needs evaluations of the curvature: add --curvature_freq 1")
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
        health.update(self.curvature(epoch))
        if not self.too_many_skips(genotype):
            self.run.write('genotype.json', genotypes.dumps(genotype) + '\n')
        return dict(validation, **health, **{name: table.tolist() for name, table in weights.items()},
                    genotype=genotype._asdict(), space=self.space.as_dict())

    def too_many_skips(self, genotype: genotypes.Genotype) -> bool:
        limit = self.args.stop_at_skips
        return limit is not None and genotypes.skip_connects(genotype) >= limit

    def curvature(self, epoch: int) -> dict[str, float]:
        """Returns {'curvature': value} after an epoch with an evaluation, otherwise {}.

        All evaluations of a run use the first validation batch: the validation images are in a random order.
        """
        freq = self.args.curvature_freq
        if freq is None or (epoch + 1) % freq:
            return {}
        began = time.time()
        with Progress(2 * self.args.batch_size, unit='product', total=CURVATURE_LIMIT, desc='curvature') as bar:
            result = self.architect.curvature(self.supernet.feed(*self.valid.batch(0, 0)), progress=bar.update)
        log.info(f"epoch {epoch + 1}: curvature {result.value:.4g} after {result.products} products (last change "
                 f"{100 * result.change:.2g} %) in {time.time() - began:.1f} s: {2 * result.products} forward and "
                 f"backward passes, a step of this search takes {5 if self.args.unrolled else 2}")
        return {'curvature': result.value} if math.isfinite(result.value) else {}

    def stop_reason(self, record: dict) -> str | None:
        """Returns why --stop_at_skips or --stop_at_curvature ends the search after this line of history.jsonl, or None.

        genotype.json is then the last genotype that both permit, if there is one.
        """
        limit, factor = self.args.stop_at_skips, self.args.stop_at_curvature
        flags = ' and '.join(f'--stop_at_{name}' for name, value in (('skips', limit), ('curvature', factor)) if value)
        if not flags:
            return None
        try:
            lines = {line['epoch']: line for line in [*self.run.history(), record]}
            found = {epoch: genotypes.check(line['genotype']) for epoch, line in lines.items()}
            curvatures = {epoch: float(line['curvature']) for epoch, line in lines.items() if 'curvature' in line}
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.run.path('history.jsonl')} has a line without a genotype or with a damaged number "
                            f"({error!r}): restore the file, or leave out {flags}") from None
        reasons, epoch = [], record['epoch']
        permitted = [number for number in found if not self.too_many_skips(found[number])]
        if epoch not in permitted:
            reasons.append(f"whose normal cell has {genotypes.skip_connects(found[epoch])} skip_connect "
                           f"(--stop_at_skips {limit})")
        before = epoch_before_collapse(curvatures, factor) if factor and epoch in curvatures else None
        if before:
            reasons.append(f"when the mean curvature of {WINDOW} evaluations was above {factor} times that of epoch "
                           f"{before} (--stop_at_curvature {factor})")
            permitted = [number for number in permitted if number <= before]
        if not reasons:
            return None
        path = self.run.path('genotype.json')
        if permitted:
            last = found[permitted[-1]]
            self.run.write('genotype.json', genotypes.dumps(last) + '\n')
            result = (f"{path} is the genotype of epoch {permitted[-1]}, which has {genotypes.skip_connects(last)} "
                      "skip_connect")
        else:
            # The file exists when the run was resumed with a lower limit; history.jsonl keeps all genotypes.
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            result = f"no epoch{f' up to {before}' if before else ''} had fewer, so there is no {path}"
        return (f"the search ended with epoch {epoch}, {', and '.join(reasons)}: {result}; --resume with a higher "
                "limit, or with none, continues the search")


WINDOW, LAG, FIRST_EPOCH = 5, 4, 10         # of epoch_before_collapse


def epoch_before_collapse(curvatures: dict[int, float], factor: float) -> int | None:
    """Returns the epoch with the genotype to keep if the curvature has risen with the last evaluation, otherwise None.

    curvatures: {epoch: dominant eigenvalue}, ascending. The early stopping of RobustDARTS (arXiv 1909.09656): the
    mean of the last five evaluations is more than `factor` times that four evaluations earlier, from epoch 10 on; the
    earlier epoch is returned. A ratio to a mean that is not positive means nothing, so there is no collapse then.
    """
    epochs, values = list(curvatures), list(curvatures.values())
    if len(epochs) < WINDOW + LAG or epochs[-1] < FIRST_EPOCH:
        return None
    before, now = np.mean(values[-WINDOW - LAG:-LAG]), np.mean(values[-WINDOW:])
    return epochs[-1 - LAG] if before > 0 and now > factor * before else None


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
