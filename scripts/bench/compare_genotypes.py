"""The experiment of the README: searches on Fashion-MNIST, then trains what was found beside published and random genotypes.

    python scripts/compare_genotypes.py --data /usr/share/datasets/fashion-mnist      # all of it: hours on two cores
    python scripts/compare_genotypes.py --out experiment                              # again: goes on where it was

All genotypes are trained alike, from scratch, and tested after the last epoch. Every run has a folder below --out and is
resumed there, so the experiment can be stopped at any time. The table goes to the console and to results.md.
"""
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
from genotypes import NODES, PRIMITIVES, Genotype

PUBLISHED = ('DARTS_PADDLE', 'DARTS_V2')


def random_genotype(seed):
    """A genotype drawn uniformly from the search space: two different states a node, any operation but none on each."""
    rng = np.random.default_rng(seed)

    def cell():
        edges = []
        for node in range(NODES):
            for state in sorted(rng.choice(2 + node, 2, replace=False)):
                edges.append((str(rng.choice(PRIMITIVES[1:])), int(state)))
        return tuple(edges)
    concat = tuple(range(2, 2 + NODES))
    return Genotype(cell(), concat, cell(), concat)


def run(script, folder, last, *flags):
    """Runs a script of this project into `folder`, or goes on with it; not at all once the file `last` says so."""
    done = os.path.join(folder, 'done')
    if not os.path.exists(done):
        started = os.path.isdir(folder) and any(name.startswith('checkpoint-') for name in os.listdir(folder))
        command = [sys.executable, os.path.join(ROOT, script), '--model_save_dir', folder, *map(str, flags)]
        print(f"{folder}: {'going on' if started else 'starting'}", flush=True)
        if subprocess.run(command + ['--resume'] * started).returncode:
            raise utils.UserError(f"{folder} ended early; what it said stands above. Start this script again to go on")
        utils.write_file(done, '')
    with open(os.path.join(folder, last), encoding='utf-8') as file:
        return file.read()


def train(args, name, arch, seed):
    """-> a line of the table."""
    folder = os.path.join(args.out, f'train_{name}_{seed}')
    history = run('train.py', folder, 'history.jsonl', '--dataset', args.dataset, *args.data, '--arch', arch, '--seed', seed,
                  '--init_channels', args.train_channels, '--layers', args.train_layers, '--epochs', args.train_epochs,
                  '--batch_size', args.train_batch_size, '--auxiliary', 'False', '--drop_path_prob', '0', '--report_freq', 200)
    last = json.loads(history.splitlines()[-1])
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as file:
        log = file.read()
    weights, multiply_adds = (float(re.search(pattern, log).group(1)) for pattern in (
        r'param size = ([\d.]+)MB', r'multiply-adds = ([\d.]+)M'))
    return dict(name=name, seed=seed, top1=100 * last['valid_top1'], weights=weights, multiply_adds=multiply_adds)


def table(rows, groups):
    """The table of all runs, then mean and spread of each group, as markdown."""
    lines = ['| genotype | seed | test top-1, % | weights, M | multiply-adds, M |', '| --- | --- | --- | --- | --- |']
    lines += [f"| {row['name']} | {row['seed']} | {row['top1']:.2f} | {row['weights']:.3f} | {row['multiply_adds']:.1f} |"
              for row in rows]
    lines += ['', '| | runs | mean | standard deviation | lowest | highest |', '| --- | --- | --- | --- | --- | --- |']
    for group, names in groups.items():
        values = [row['top1'] for row in rows if row['name'] in names]
        spread = f'{statistics.stdev(values):.2f}' if len(values) > 1 else ''
        lines.append(f'| {group} | {len(values)} | {statistics.mean(values):.2f} | {spread} | {min(values):.2f} '
                     f'| {max(values):.2f} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add, whole = parser.add_argument, utils.number(int, 1)
    add('--out', default='experiment', help='folder of all runs (%(default)s)')
    add('--dataset', default='fashion_mnist', help='as of train_search.py (%(default)s)')
    add('--data', default=None, help='folder of the data set')
    add('--search_seeds', type=utils.number(int, 0), nargs='+', default=[0, 1], help='a search each (%(default)s)')
    add('--search_channels', type=whole, default=4, help='(%(default)s)')
    add('--search_layers', type=whole, default=5, help='(%(default)s)')
    add('--search_epochs', type=whole, default=5, help='(%(default)s)')
    add('--search_batch_size', type=whole, default=64, help='(%(default)s)')
    add('--random', type=utils.number(int, 0), default=4, help='how many random genotypes (%(default)s)')
    add('--train_seeds', type=utils.number(int, 0), nargs='+', default=[0],
        help='a training of each genotype each (%(default)s)')
    add('--train_channels', type=whole, default=8, help='(%(default)s)')
    add('--train_layers', type=whole, default=5, help='(%(default)s)')
    add('--train_epochs', type=whole, default=3, help='(%(default)s)')
    add('--train_batch_size', type=whole, default=64, help='(%(default)s)')
    args = parser.parse_args()
    args.data = ['--data', args.data] if args.data else []
    os.makedirs(args.out, exist_ok=True)
    archs, groups = {}, {'searched here': [], 'published': list(PUBLISHED), 'random': []}
    for seed in args.search_seeds:
        name, folder = f'searched_{seed}', os.path.join(args.out, f'search_{seed}')
        run('train_search.py', folder, 'genotype.json', '--dataset', args.dataset, *args.data, '--seed', seed,
            '--init_channels', args.search_channels, '--layers', args.search_layers, '--epochs', args.search_epochs,
            '--batch_size', args.search_batch_size)
        archs[name] = os.path.join(folder, 'genotype.json')
        groups['searched here'].append(name)
    archs.update({name: name for name in PUBLISHED})
    for seed in range(args.random):
        name, path = f'random_{seed}', os.path.join(args.out, f'random_{seed}.json')
        utils.write_file(path, genotypes.dumps(random_genotype(seed)) + '\n')
        archs[name] = path
        groups['random'].append(name)
    rows = [train(args, name, arch, seed) for seed in args.train_seeds for name, arch in archs.items()]
    result = table(rows, {group: names for group, names in groups.items() if names})
    utils.write_file(os.path.join(args.out, 'results.md'), result)
    print(result)


if __name__ == '__main__':
    utils.run(main)
