"""Runs the experiment of the README: searches, then trains the found, the published and random genotypes alike.

    python scripts/bench/compare_genotypes.py --data /usr/share/datasets/fashion-mnist   # hours on two cores
    python scripts/bench/compare_genotypes.py --out experiment                           # again: continues

Every genotype is trained from scratch with the same settings, and tested after the last epoch. Every run has a folder
in --out and is resumed there, so the experiment can be stopped at any time. The table is printed and written to
results.md.
"""
from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils

import numpy as np

import genotypes
from genotypes import DARTS_SPACE, NONE, Genotype, SearchSpace

PUBLISHED = ('DARTS_PADDLE', 'DARTS_V2')


def random_genotype(seed: int, space: SearchSpace = DARTS_SPACE) -> Genotype:
    """Draws a genotype uniformly from the search space: two different states per node, any operation except none."""
    rng, operations = np.random.default_rng(seed), [name for name in space.primitives if name != NONE]

    def cell():
        return tuple((str(rng.choice(operations)), int(state))
                     for node in range(space.nodes) for state in sorted(rng.choice(2 + node, 2, replace=False)))
    concat = tuple(range(2, 2 + space.nodes))
    return Genotype(cell(), concat, cell(), concat)


def run(args, kind: str, folder: str, seed: int, *flags) -> None:
    """Runs a script with the run folder `folder`, or resumes it; a complete run is not repeated.

    kind: 'search' or 'train', the prefix of its settings in `args`. Raises UserError when the script fails.
    """
    done = os.path.join(folder, 'done')
    if os.path.exists(done):
        return
    started = os.path.isdir(folder) and any(name.startswith('checkpoint-') for name in os.listdir(folder))
    script = {'search': 'train_search.py', 'train': 'train.py'}[kind]
    command = [sys.executable, os.path.join(ROOT, script), '--model_save_dir', folder, '--dataset', args.dataset,
               '--seed', str(seed), *flags, *(['--data', args.data] if args.data else [])]
    for flag in ('init_channels', 'layers', 'epochs', 'batch_size'):
        command += [f'--{flag}', str(getattr(args, f"{kind}_{flag.replace('init_', '')}"))]
    print(f"{folder}: {'continuing' if started else 'starting'}", flush=True)
    if subprocess.run(command + ['--resume'] * started).returncode:
        raise utils.UserError(f"{folder}: {script} ended early, its error message is above; "
                              "start this script again to continue")
    utils.write_file(done, '')


def search(args, seed: int) -> str:
    """Runs a search; returns the path of its genotype."""
    folder = os.path.join(args.out, f'search_{seed}')
    run(args, 'search', folder, seed)
    return os.path.join(folder, 'genotype.json')


def train(args, name: str, arch: str, seed: int) -> dict:
    """Trains a genotype; returns its row of the table. arch: its name in genotypes.py or a path."""
    folder = os.path.join(args.out, f'train_{name}_{seed}')
    run(args, 'train', folder, seed, '--arch', arch, '--auxiliary', 'False', '--drop_path_prob', '0',
        '--report_freq', '200')
    with open(os.path.join(folder, 'history.jsonl'), encoding='utf-8') as file:
        last = json.loads(file.read().splitlines()[-1])
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as file:
        log = file.read()
    weights, multiply_adds = (float(re.search(pattern, log).group(1)) for pattern in (
        r'param size = ([\d.]+)MB', r'multiply-adds = ([\d.]+)M'))
    return dict(name=name, seed=seed, top1=100 * last['test_top1'], weights=weights, multiply_adds=multiply_adds)


def table(rows: list[dict], groups: dict[str, list]) -> str:
    """Returns the table of all runs, then mean and spread of each group, as Markdown."""
    lines = ['| genotype | seed | test top-1, % | weights, M | multiply-adds, M |', '| --- | --- | --- | --- | --- |']
    lines += ['| {name} | {seed} | {top1:.2f} | {weights:.3f} | {multiply_adds:.1f} |'.format(**row) for row in rows]
    lines += ['', '| | runs | mean | standard deviation | lowest | highest |', '| --- | --- | --- | --- | --- | --- |']
    for group, names in groups.items():
        values = [row['top1'] for row in rows if row['name'] in names]
        spread = f'{statistics.stdev(values):.2f}' if len(values) > 1 else ''
        lines.append(f'| {group} | {len(values)} | {statistics.mean(values):.2f} | {spread} | {min(values):.2f} '
                     f'| {max(values):.2f} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--out', type=utils.path, default='experiment', help='folder of all runs (%(default)s)')
    add('--dataset', default='fashion_mnist', help='data set, as of train_search.py (%(default)s)')
    add('--data', type=utils.path, help='folder of the data set')
    add('--random', type=utils.number(int, 0), default=4, help='number of random genotypes (%(default)s)')
    for kind, seeds, channels, epochs in (('search', [0, 1], 4, 5), ('train', [0], 8, 3)):
        add(f'--{kind}_seeds', type=utils.number(int, 0), nargs='+', default=seeds,
            help=f'{kind}: seeds, one run each (%(default)s)')
        for name, default in (('channels', channels), ('layers', 5), ('epochs', epochs), ('batch_size', 64)):
            add(f'--{kind}_{name}', type=utils.number(int, 1), default=default, help=f'{kind}: {name} (%(default)s)')
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    searched = {f'searched_{seed}': search(args, seed) for seed in args.search_seeds}
    drawn = {f'random_{seed}': os.path.join(args.out, f'random_{seed}.json') for seed in range(args.random)}
    for seed, path in enumerate(drawn.values()):
        utils.write_file(path, genotypes.dumps(random_genotype(seed)) + '\n')
    groups = {'searched here': searched, 'published': dict(zip(PUBLISHED, PUBLISHED)), 'random': drawn}
    rows = [train(args, name, arch, seed) for seed in args.train_seeds
            for group in groups.values() for name, arch in group.items()]
    result = table(rows, {group: list(archs) for group, archs in groups.items() if archs})
    utils.write_file(os.path.join(args.out, 'results.md'), result)
    print(result)


if __name__ == '__main__':
    utils.run(main)
