"""Measures this project against a peer, both alternately in the same run: medians and ratios.

    python scripts/bench/benchmark.py                          # all parts
    python scripts/bench/benchmark.py start                    # --full: also the size of the search, ten minutes more
    python scripts/bench/benchmark.py search_step --batch_size 16 64
    python scripts/bench/benchmark.py cifar_input imagenet_input --rounds 9 --json

The peer of the steps is tests/reference/pytorch.py (pip install torch). The peer of `start` and `launches` is
edge_by_edge.py, that of `methods` first-order DARTS. Each side is a process of its own (sides.py). A peer that computes
the same function has to give the same results before it is timed.
"""
from __future__ import annotations

import collections
import json
import os
import statistics
import sys
import tempfile

from sides import CHANNELS, COMPILED, LAYERS, LAYOUTS, Side, alternate       # before utils: sets the path

import utils

import numpy as np

from gpu import host, launches, memory
from inputs import cifar_input, imagenet_input

SMALL_SIZES = (4, 3), (4, 4), (4, 5)         # channels and cells that are built edge by edge within minutes


# ---------------------------------------------------------------------------------------------------
# Steps of the search and of the training

def check_equal(project: dict, peer: dict) -> None:
    """Raises UserError unless both sides have the same results, {name: number or list}, within 1 %.

    In float64 the gradients of alpha agree to 3e-8 (tests/test_convert_weights.py compares small networks). In single
    precision both differ from that by 1e-3 of its largest value.
    """
    for name, expected in peer.items():
        expected, found = np.array(expected), np.array(project[name])
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        if not difference < 1e-2:
            raise utils.UserError(f"the two sides do not compute the same: {name} differs by {difference:.1e}; "
                                  "their times cannot be compared")


def compare(what: str, task: str, args, **settings) -> list[dict]:
    """Returns time and memory of the steps of a task, 'search' or 'training', next to those of PyTorch.

    This project is timed alternately with each layout of the peer, and the fastest one counts. Only one peer runs at a
    time: two of them would not fit into the memory of a small machine.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        settings['weights'] = os.path.join(folder, 'weights.npz')
        project = Side(f'project_{task}', **settings)
        for layout in LAYOUTS + (COMPILED,) * args.compile:
            peer = Side(f'pytorch_{task}', layout=layout, **settings)
            check_equal(project.answer, peer.answer)
            seconds = alternate({'project': project.step, 'peer': peer.step}, args.rounds)
            name = f"PyTorch, {layout.replace('_format', '').replace('_', ' ')}"
            results.append({'seconds': seconds, 'memory': peer.end(), 'peer is': name})
        memory = project.end()
    best = min(results, key=lambda result: result['seconds']['peer'])
    return [{'what': f'{what}, time', 'unit': 's', **best['seconds'], 'peer is': best['peer is']},
            {'what': f'{what}, peak memory', 'unit': 'GB', 'project': memory, 'peer': best['memory'],
             'peer is': best['peer is']}]


def search_step(args) -> list[dict]:
    """A step of the search, second and first order."""
    rows = []
    for batch_size in args.batch_size:
        for unrolled in (True, False):
            order = 'second' if unrolled else 'first'
            rows += compare(f'search step, {order} order, batch {batch_size}', 'search', args, batch_size=batch_size,
                            unrolled=unrolled)
    return rows


def methods(args) -> list[dict]:
    """A step of each method, of equal size, next to one of first-order DARTS."""
    rows, peer = [], 'DARTS, first order'
    settings = {peer: dict(unrolled=False), 'DARTS, second order': dict(unrolled=True),
                'PC-DARTS, first order': dict(unrolled=False, partial_channels=4),
                'PC-DARTS, second order': dict(unrolled=True, partial_channels=4)}
    for batch_size in args.batch_size:
        sides = {name: Side('project_search', batch_size=batch_size, **flags) for name, flags in settings.items()}
        seconds = alternate({name: side.step for name, side in sides.items()}, args.rounds)
        memory = {name: side.end() for name, side in sides.items()}
        rows += [{'what': f'{name}, batch {batch_size}, {what}', 'unit': unit, 'project': values[name],
                  'peer': values[peer], 'peer is': peer}
                 for what, unit, values in (('time of a step', 's', seconds), ('peak memory', 'GB', memory))
                 for name in settings if name != peer]
    return rows


def training_step(args) -> list[dict]:
    """A step of the training of DARTS_PADDLE for CIFAR-10."""
    return compare('training step, batch 32', 'training', args, batch_size=32)


def growth(args) -> list[dict]:
    """The second-order step at several batches, channels and numbers of cells, and the time of its operators."""
    rows, base = [], dict(batch_size=16, channels=CHANNELS, layers=LAYERS)
    for name, values in (('batch_size', (16, 32, 64)), ('channels', (8, 32)), ('layers', (5, 11))):
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                side = Side('project_search', unrolled=True, weights=os.path.join(folder, 'weights.npz'),
                            **dict(base, **{name: value}))
                seconds = alternate({'project': side.step}, args.rounds)['project']
            rows += [{'what': f'search step, {name} {value}, time', 'unit': 's', 'project': seconds},
                     {'what': f'search step, {name} {value}, peak memory', 'unit': 'GB', 'project': side.end()}]
    side = Side('project_operators', **base)
    side.end()
    return rows + [{'what': f'share of a pass: {name}', 'unit': '%', 'project': share}
                   for name, share in side.answer['shares']]


# ---------------------------------------------------------------------------------------------------
# Start

def start(args) -> list[dict]:
    """Seconds to the first result, operators and memory: all programs of a search here, one pass edge by edge."""
    rows = []
    for channels, layers in SMALL_SIZES + ((CHANNELS, LAYERS),) * args.full:
        answers, memory = collections.defaultdict(list), {}
        for _ in range(1 if layers == LAYERS else min(args.rounds, 3)):
            for key, name in (('project', 'project_start'), ('peer', 'edge_by_edge_start')):
                side = Side(name, channels=channels, layers=layers)
                answers[key].append(side.answer)
                memory[key] = side.end()
        check_equal(answers['project'][0], {'loss': answers['peer'][0]['loss']})
        seconds, operators = ({key: statistics.median(answer[name] for answer in side) for key, side in answers.items()}
                              for name in ('seconds', 'operators'))
        rows += [{'what': f'start, C {channels}, {layers} cells, {what}', 'unit': unit, **values,
                  'peer is': 'one pass, edge by edge'}
                 for what, unit, values in (('ready', 's', seconds), ('operators', '', operators),
                                            ('peak memory', 'GB', memory))]
    side = Side('project_start', channels=CHANNELS, layers=LAYERS)
    side.end()
    return [*rows, {'what': 'start at the defaults, ready', 'unit': 's', 'project': side.answer['seconds']}]


# ---------------------------------------------------------------------------------------------------
# Command line

PARTS = {part.__name__: part for part in (start, search_step, methods, training_step, cifar_input, imagenet_input,
                                          growth, launches, host, memory)}


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('parts', nargs='*', metavar='part', help=f"parts to measure: {', '.join(PARTS)} (all)")
    add('--rounds', type=utils.number(int, 1), default=7, help='timed calls per side (%(default)s)')
    add('--batch_size', type=utils.number(int, 2), nargs='+', default=[16, 64],
        help='of search_step and methods (16 64)')
    add('--compile', action='store_true', help='torch.compile as a third peer of the steps; it compiles for minutes')
    add('--full', action='store_true', help='start also edge by edge at the size of the search, ten minutes')
    add('--json', action='store_true', help='JSON instead of a table')
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: there are {', '.join(PARTS)}")
    rows = []
    for name in args.parts or PARTS:
        print(f"measuring {name}", file=sys.stderr)
        rows += PARTS[name](args)
    for row in rows:
        if 'peer' in row:
            row['ratio'] = row['project'] / row['peer']
    print(json.dumps(rows, indent=2) if args.json else table(rows))


def table(rows: list[dict]) -> str:
    """Returns the rows as text: what was measured, this project, the peer, the unit, the ratio of both values."""
    lines = [f"{'':60}{'this project':>12}{'peer':>10}  {'unit':10}ratio"]
    for row in rows:
        digits = 1 if row['project'] >= 100 else 2
        peer = f"{row['peer']:10.{digits}f}" if 'peer' in row else f"{'':10}"
        ratio = f"{row['ratio']:.2f} ({row['peer is']})" if 'peer' in row else ''
        lines.append(f"{row['what']:60}{row['project']:12.{digits}f}{peer}  {row['unit']:10}{ratio}".rstrip())
    return '\n'.join(lines)


if __name__ == '__main__':
    utils.run(main)
