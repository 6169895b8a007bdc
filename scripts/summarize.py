"""Prints the summary of a folder of scripts/quickstart.sh: the cells found, accuracies, and paths of the results.

    python scripts/summarize.py quickstart-1 --seconds 300 --install_seconds 60

Nodes have the names of the pictures: inputs c_{k-2} and c_{k-1}, nodes 0, 1, ..., output c_k. Needs no Paddle.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils                       # first: it reports a missing package in one line
import genotypes
import visualize
from utils import UserError

PICTURES = {'genotype.png': 'both cells', 'networks.gif': 'the search, one frame per epoch',
            'alphas.png': 'mixing weights over the epochs'}


def read_training(path: str) -> list[dict]:
    """Returns the epochs of a training's history.jsonl; the last one has the numbers test_top1 and best_top1.

    Raises UserError when the file cannot be read or is not the history of a training.
    """
    try:
        epochs = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
        for key in ('test_top1', 'best_top1'):
            float(epochs[-1][key])
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = getattr(error, 'strerror', None) or f'its last line has to hold test_top1 and best_top1 ({error})'
        raise UserError(f"cannot read the history of a training from {path}: {reason}; "
                        "continue the run with scripts/quickstart.sh") from None
    return epochs


def describe_cell(genotype: genotypes.Genotype, kind: str) -> list[str]:
    """Returns one line per node of a cell, such as `0 = sep_conv_3x3(c_{k-2}) + skip_connect(c_{k-1})`, then c_k."""
    edges, name = getattr(genotype, kind), visualize.state_name
    terms = [f'{operation}({name(state)})' for operation, state in edges]
    lines = [f'{node} = {terms[2 * node]} + {terms[2 * node + 1]}' for node in range(len(edges) // 2)]
    return lines + [f"c_k = concat({', '.join(name(state) for state in getattr(genotype, kind + '_concat'))})"]


def summarize(folder: str, seconds: int, install_seconds: int) -> str:
    """Returns the summary of a quickstart folder. Raises UserError when one of its results is missing."""
    search = visualize.read_history(os.path.join(folder, 'search', 'history.jsonl'))
    training = read_training(os.path.join(folder, 'train', 'history.jsonl'))
    genotype = genotypes.load(os.path.join(folder, 'search', 'genotype.json'))
    lines = [f'Summary ({seconds // 60} min {seconds % 60} s, after {install_seconds} s of installation)']
    for kind in ('normal', 'reduce'):
        lines += ['', visualize.KINDS[kind], *('    ' + line for line in describe_cell(genotype, kind))]
    lines += ['', f'search      {len(search)} epochs, validation top-1 {100 * search[-1].top1:.1f} %',
              f"training    {len(training)} epochs, test top-1 {100 * training[-1]['test_top1']:.1f} %, "
              f"{100 * training[-1]['best_top1']:.1f} % in the best epoch",
              f'genotype    {folder}/search/genotype.json',
              f'weights     {folder}/train/last.npz']
    lines += [f'picture     {folder}/pictures/{name}: {content}' for name, content in PICTURES.items()
              if os.path.exists(os.path.join(folder, 'pictures', name))]
    return '\n'.join(lines + ['', f'''\
The sample has only 2,000 images. Next:

    source {os.path.join(os.path.dirname(sys.executable), 'activate')}
    python train_search.py --help                       # a search of full size: CIFAR-10, 50 epochs, a GPU
    python train.py --arch DARTS_PADDLE                 # training of a published genotype on CIFAR-10
    python visualize.py DARTS_PADDLE                    # picture of this genotype'''])


def main() -> None:
    """Prints the summary of the folder on the command line."""
    parser = utils.Parser(description="Print the summary of a folder of scripts/quickstart.sh.")
    parser.add_argument('folder', help='folder of scripts/quickstart.sh, such as quickstart-1')
    for flag, steps in (('--seconds', 'search, training and drawing'), ('--install_seconds', 'the installation')):
        parser.add_argument(flag, type=utils.number(int, 0), default=0,
                            help=f'duration of {steps} in seconds (%(default)s)')
    args = parser.parse_args()
    print(summarize(args.folder, args.seconds, args.install_seconds))


if __name__ == '__main__':
    utils.run(main)
