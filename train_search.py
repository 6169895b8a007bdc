"""Searches a cell by differentiable architecture search (DARTS, arXiv 1806.09055).

    python train_search.py                                         # CIFAR-10, second order
    python train_search.py --unrolled False                        # first order
    python train_search.py --recipe pc_darts                       # PC-DARTS (arXiv 1907.05737), the authors' settings
    python train_search.py --primitives none,skip_connect,sep_conv_3x3 --nodes 3          # another search space
    python train_search.py --dataset fashion_mnist_sample --init_channels 4 --epochs 2    # small, no download
    python train_search.py --dataset folder --data my_images       # custom images, or --dataset npz for arrays
    python train_search.py --random --seed 3                       # no search: a random genotype, for comparison
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

import utils                       # first: it reports a missing package in one line
import numpy as np

import genotypes
import operations
import reader
from architect import CURVATURE_LIMIT, Architect
from engine import distributed, trainer
from engine.checkpoint import Run, read_weights
from engine.console import Progress, log
from engine.optimizers import MomentumSGD
from genotypes import SearchSpace
from model_search import CELL_KINDS, Supernet
from utils import UserError


WINDOW, LAG, FIRST_EPOCH = 5, 4, 10    # of epoch_before_collapse
# Settings of published methods: --recipe makes them the defaults.
RECIPES = {
    'darts': {},
    'pc_darts': dict(partial_channels=4, batch_size=256, learning_rate=0.1, learning_rate_min=0.0, unrolled=False,
                     arch_learning_rate=6e-4, arch_start_epoch=15),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Search a convolutional cell with DARTS.")
    add = parser.add_argument
    add('--recipe', choices=list(RECIPES), default='darts',
        help='settings of a published method, which other flags override (%(default)s)')
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
    add('--partial_channels', type=utils.number(int, 1), default=1, metavar='K',
        help='one K-th of the channels passes the operations of an edge, and the edges of a node have weights: '
             'PC-DARTS; 1: DARTS (%(default)s)')
    add('--arch_start_epoch', type=utils.number(int, 0), default=0,
        help='number of epochs that train only the weights, before the first update of alpha (%(default)s)')
    operations.add_arguments(parser)
    add('--stop_at_skips', type=utils.number(int, 1), metavar='N',
        help='number of skip_connect in the normal cell that ends the search; genotype.json is then the last genotype '
             'with fewer (no limit)')
    add('--curvature_freq', type=utils.number(int, 1), metavar='N',
        help='epochs between evaluations of the curvature, the dominant eigenvalue of the Hessian of the validation '
             'loss with respect to alpha, each as long as a few steps (no evaluation)')
    add('--stop_at_curvature', type=utils.number(float, 1, open_low=True), metavar='FACTOR',
        help='ratio, such as 1.3, of the mean of the last five evaluations of the curvature to that four evaluations '
             'earlier above which the search ends, from epoch 10 on, so nine evaluations are needed; genotype.json is '
             'then the genotype of the earlier evaluation (no limit)')
    add('--random', type=utils.boolean, default=False,
        help='no search: write a genotype that is drawn uniformly from the search space by --seed (%(default)s)')
    add('--pretrained', type=utils.path, metavar='PATH', help='initial weights (and alpha) of a supernet, an .npz of '
        'scripts/convert_weights.py')
    args = parser.parse_args(argv)
    for name, value in RECIPES[args.recipe].items():
        if name not in parser.given:
            setattr(args, name, value)
    if args.random and args.resume:
        parser.error("--random draws a genotype at once: there is nothing to --resume")
    if args.stop_at_skips is not None and args.stop_at_skips > 2 * args.nodes:
        parser.error(f"--stop_at_skips {args.stop_at_skips}: a cell of {args.nodes} nodes has {2 * args.nodes} edges")
    searched = args.epochs - args.arch_start_epoch                    # epochs that update alpha
    if searched < 1:
        parser.error(f"--arch_start_epoch {args.arch_start_epoch}: alpha would never be updated in {args.epochs} "
                     "epochs; give a smaller one, or more epochs")
    if args.stop_at_curvature is not None and args.curvature_freq is None:
        parser.error("--stop_at_curvature needs evaluations of the curvature: add --curvature_freq 1")
    if args.stop_at_curvature is not None and (args.epochs < FIRST_EPOCH
                                               or searched // args.curvature_freq < WINDOW + LAG):
        parser.error(f"--stop_at_curvature needs {WINDOW + LAG} evaluations after updates of alpha, and {FIRST_EPOCH} "
                     f"epochs: give more --epochs than {args.epochs}, or a smaller --curvature_freq than "
                     f"{args.curvature_freq}")
    return args


class Search:
    """The search, as a task of engine.trainer.run_epochs.

    In every step alpha is updated first, on a train and a random validation batch, then the weights on the train batch
    with the new alpha. In the first --arch_start_epoch epochs alpha is not updated.
    """

    def __init__(self, args: argparse.Namespace, data: reader.Dataset, run: Run, place):
        self.args, self.run = args, run
        self.space = SearchSpace(args.primitives, args.nodes)
        self.supernet = Supernet(args.init_channels, args.class_num, args.layers, seed=args.seed, place=place,
                                 space=self.space, partial_channels=args.partial_channels, image_size=data.image_size)
        self.tables = {name: (self.space.node_names, self.space.state_names) if name.startswith('betas') else
                       (self.space.edge_names, self.space.primitives) for name in self.supernet.alphas()}
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
        train = self.train.batch(epoch, step)
        return train, self.valid.random_batch(epoch, step) if epoch >= self.args.arch_start_epoch else None

    def train_step(self, batch: tuple, epoch: int, step: int) -> tuple:
        train, lr = self.supernet.feed(*batch[0]), self.learning_rate(epoch)
        if batch[1]:
            self.architect.update(train, self.supernet.feed(*batch[1]), lr)         # steps 1 to 6: alpha
        result = self.supernet.run(train)                               # 7: the weights, with the new alpha
        distributed.average_gradients(self.store, 'gradient')
        self.optimizer.step(lr)
        return (*result, len(batch[0][1]))

    def finish_epoch(self, epoch: int) -> dict:
        validation = trainer.evaluate(self.supernet, self.valid, self.args).means('valid')
        weights, genotype = self.supernet.mixing_weights(), self.supernet.genotype()
        tables = {name: self.space.by_node(values) if name.startswith('betas') else values.tolist()
                  for name, values in weights.items()}
        for name, table in tables.items():
            log.info(format_table(name, table, *self.tables[name]))
        log.info(f"genotype = {genotype}")
        log.info(f"epoch {epoch + 1}: validation {trainer.as_text(validation, 'valid')}")
        health = {'skip_connects': genotypes.skip_connects(genotype)}
        for kind in CELL_KINDS:
            health[f'entropy_{kind}'] = genotypes.entropy(weights[f'alphas_{kind}'])
        log.info(f"epoch {epoch + 1}: {health['skip_connects']} skip_connect in the normal cell; entropy of alpha: "
                 f"normal {health['entropy_normal']:.4f}, reduce {health['entropy_reduce']:.4f} "
                 f"({math.log(len(self.space.primitives)):.4f} undecided, 0 decided)")
        health.update(self.curvature(epoch))
        if not self.too_many_skips(genotype):
            self.run.write('genotype.json', genotypes.dumps(genotype) + '\n')
        return dict(validation, **health, **tables,
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

        genotype.json is then the last genotype that both permit, if there is one. Epochs before the first update of
        alpha do not count: their genotypes are those of the initial alpha.
        """
        limit, factor = self.args.stop_at_skips, self.args.stop_at_curvature
        flags = ' and '.join(f'--stop_at_{name}' for name, value in (('skips', limit), ('curvature', factor)) if value)
        if not flags:
            return None
        try:
            lines = {line['epoch']: line for line in [*self.run.history(), record]
                     if line['epoch'] > self.args.arch_start_epoch}
            found = {epoch: genotypes.check(line['genotype']) for epoch, line in lines.items()}
            curvatures = {epoch: float(line['curvature']) for epoch, line in lines.items() if 'curvature' in line}
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.run.path('history.jsonl')} has a line without a genotype or with a damaged number "
                            f"({error!r}): restore the file, or leave out {flags}") from None
        reasons, epoch = [], record['epoch']
        if epoch not in found:
            return None
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


def format_table(name: str, table: list, row_names: list[str], column_names: list[str]) -> str:
    """Returns rows of mixing weights as text; rows may be shorter than there are columns."""
    row_names = ['', *(row.replace('to', '->') for row in row_names)]
    widths = [max(len(column), len('0.1250')) + 2 for column in column_names]
    lines = [f"mixing weights of {name}"]
    for row_name, row in zip(row_names, [column_names, *([f'{weight:.4f}' for weight in row] for row in table)]):
        lines.append(row_name.ljust(max(map(len, row_names))) + ''.join(map(str.rjust, row, widths)))
    return '\n'.join(lines)


def write_random_genotype(args: argparse.Namespace) -> None:
    """Writes a genotype of the search space to genotype.json; raises UserError when the folder is not empty."""
    path = os.path.join(args.model_save_dir, 'genotype.json')
    genotype = genotypes.draw(SearchSpace(args.primitives, args.nodes), args.seed)
    try:
        os.makedirs(args.model_save_dir, exist_ok=True)
        if os.listdir(args.model_save_dir):
            raise UserError(f"--random: {args.model_save_dir} is not empty: choose another folder with "
                            "--model_save_dir")
        utils.write_file(path, genotypes.dumps(genotype) + '\n')
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    print(f"{genotype}\n{path}: a random genotype, seed {args.seed}; python train.py --arch {path} trains it")


def main() -> None:
    args = parse_args()
    if args.random:
        if distributed.is_main:
            write_random_genotype(args)
        return
    place = trainer.start(args)
    pretrained = None
    if args.pretrained:
        metadata, pretrained = read_weights(args.pretrained)
        recorded = genotypes.recorded_space(args.pretrained, metadata)
        SearchSpace(args.primitives, args.nodes).check_recorded(args.pretrained, recorded)
        partial_channels = metadata.get('partial_channels', args.partial_channels)
        if partial_channels != args.partial_channels:
            raise UserError(f"{args.pretrained} is of a supernet with partial_channels {partial_channels}: give "
                            f"--partial_channels {partial_channels}")
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
