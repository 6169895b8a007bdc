"""Measures this project against a peer, both alternately in the same run: medians, ratios and their spread.

    python scripts/bench/benchmark.py                          # all parts
    python scripts/bench/benchmark.py search_step training_step      # steps, next to PyTorch: pip install torch
    python scripts/bench/benchmark.py search_step --sizes 4x5x64     # channels x cells x batch, instead of the defaults
    python scripts/bench/benchmark.py search_step --avx2             # without AVX-512, on both sides
    python scripts/bench/benchmark.py machine                  # arithmetic, share of the matrix rate, phases of a step
    python scripts/bench/benchmark.py shared                   # steps next to a process that occupies a core
    python scripts/bench/benchmark.py start                    # --full: also the size of the search, ten minutes more
    python scripts/bench/benchmark.py cifar_input imagenet_input --rounds 9 --json
    python scripts/bench/benchmark.py search_step machine --save NAME      # also writes scripts/bench/results/NAME.json

The peer of the steps is tests/reference/pytorch.py. The peer of `start` and `launches` is edge_by_edge.py, that of
`methods` first-order DARTS, that of `shared` the same step alone. Each side is a process of its own (sides.py). A peer
that computes the same function has to give the same results before it is timed.

A time is the median of --rounds calls of each side, called alternately. The numbers in brackets are its lowest and
highest round; those of the ratio are of project and peer in the same round. --json and --save add what identifies the
result (record.py): processor, cores, vector instructions, versions, commit, date.
"""
from __future__ import annotations

import argparse
import collections
import json
import os
import re
import sys
import tempfile

import sides                             # before utils: sets the path
from sides import (CHANNELS, COMPILED, LAYERS, LAYOUTS, SEARCH_SIZES, TRAINING_SIZES, Side, Size, alternate, medians,
                   steps_of)

import utils

import numpy as np

import record
from gpu import host, launches, memory
from inputs import cifar_input, imagenet_input
from machine import machine, shared

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
            results.append({'time': medians(seconds), 'memory': peer.end(), 'peer is': name})
        memory = project.end()
    best = min(results, key=lambda result: result['time']['peer'])
    return [{'what': f'{what}, time', 'unit': 's', **best['time'], 'peer is': best['peer is']},
            {'what': f'{what}, peak memory', 'unit': 'GB', 'project': memory, 'peer': best['memory'],
             'peer is': best['peer is']}]


def search_step(args) -> list[dict]:
    """A step of the search, second and first order."""
    return [row for what, task, settings in steps_of('search', args.sizes)
            for row in compare(what, task, args, **settings)]


def methods(args) -> list[dict]:
    """A step of each method, of equal size, next to one of first-order DARTS."""
    rows, peer = [], 'DARTS, first order'
    settings = {peer: dict(unrolled=False), 'DARTS, second order': dict(unrolled=True),
                'PC-DARTS, first order': dict(unrolled=False, partial_channels=4),
                'PC-DARTS, second order': dict(unrolled=True, partial_channels=4)}
    for size in args.sizes or SEARCH_SIZES[:2]:
        processes = {name: Side('project_search', **size._asdict(), **flags) for name, flags in settings.items()}
        seconds = alternate({name: side.step for name, side in processes.items()}, args.rounds)
        memory = {name: side.end() for name, side in processes.items()}
        for name in list(settings)[1:]:
            time = medians({'project': seconds[name], 'peer': seconds[peer]})
            rows += [{'what': f'{name}, {size}, time', 'unit': 's', **time, 'peer is': peer},
                     {'what': f'{name}, {size}, peak memory', 'unit': 'GB', 'project': memory[name],
                      'peer': memory[peer], 'peer is': peer}]
    return rows


def training_step(args) -> list[dict]:
    """A step of the training of DARTS_PADDLE for CIFAR-10, and of smaller networks of this genotype."""
    return [row for what, task, settings in steps_of('training', args.sizes)
            for row in compare(what, task, args, **settings)]


def growth(args) -> list[dict]:
    """The second-order step at several batches, channels and numbers of cells, and the time of its operators."""
    rows, base = [], dict(batch_size=16, channels=CHANNELS, layers=LAYERS)
    for name, values in (('batch_size', (16, 32, 64)), ('channels', (8, 32)), ('layers', (5, 11))):
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                side = Side('project_search', unrolled=True, weights=os.path.join(folder, 'weights.npz'),
                            **dict(base, **{name: value}))
                time = medians(alternate({'project': side.step}, args.rounds))
            rows += [{'what': f'search step, {name} {value}, time', 'unit': 's', **time},
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
        ready = medians({key: [answer['seconds'] for answer in side] for key, side in answers.items()})
        operators = {key: side[0]['operators'] for key, side in answers.items()}
        rows += [{'what': f'start, C {channels}, {layers} cells, {what}', 'unit': unit, **values,
                  'peer is': 'one pass, edge by edge'}
                 for what, unit, values in (('ready', 's', ready), ('operators', '', operators),
                                            ('peak memory', 'GB', memory))]
    side = Side('project_start', channels=CHANNELS, layers=LAYERS)
    side.end()
    return [*rows, {'what': 'start at the defaults, ready', 'unit': 's', 'project': side.answer['seconds']}]


# ---------------------------------------------------------------------------------------------------
# Command line

PARTS = {part.__name__: part for part in (start, search_step, methods, training_step, machine, shared, cifar_input,
                                          imagenet_input, growth, launches, host, memory)}


def size(text: str) -> Size:
    """Parses channels x cells x batch, a type for argparse."""
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)x([1-9]\d*)', text)
    if not match or int(match[3]) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not CHANNELSxCELLSxBATCH with a batch of at least 2, as 16x8x64")
    return Size(*map(int, match.groups()))


def name_of_file(text: str) -> str:
    """Returns the path of a saved result, a type for argparse."""
    if not re.fullmatch(r'\w[\w.-]*', text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits, dots, - and _")
    return os.path.join(record.FOLDER, f'{text}.json')


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('parts', nargs='*', metavar='part', help=f"parts to measure: {', '.join(PARTS)} (all)")
    add('--rounds', type=utils.number(int, 1), default=7, help='timed calls per side (%(default)s)')
    add('--sizes', type=size, nargs='+', metavar='CxCELLSxBATCH',
        help=f"sizes of search_step, methods, training_step, machine and shared (of a search: "
             f"{' '.join('x'.join(map(str, size)) for size in SEARCH_SIZES)}, of a training: "
             f"{' '.join('x'.join(map(str, size)) for size in TRAINING_SIZES)}; methods and shared: some of them)")
    add('--avx2', action='store_true', help='both sides without AVX-512, as on a processor that lacks it')
    add('--compile', action='store_true', help='torch.compile as a third peer of the steps; it compiles for minutes')
    add('--full', action='store_true', help='start also edge by edge at the size of the search, ten minutes')
    add('--json', action='store_true', help='JSON instead of a table')
    add('--save', type=name_of_file, metavar='NAME', help='write the JSON to scripts/bench/results/NAME.json too')
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: there are {', '.join(PARTS)}")
    if args.avx2:
        if 'avx2' not in record.features():
            parser.error("--avx2 needs a processor with AVX2")
        sides.ENVIRONMENT.update(sides.AVX2, CXXFLAGS=' '.join(
            filter(None, (sides.ENVIRONMENT.get('CXXFLAGS'), sides.AVX2['CXXFLAGS']))))
    parts = args.parts or list(PARTS)
    sizes = {'sizes': ['x'.join(map(str, each)) for each in args.sizes]} if args.sizes else {}
    result = {**record.describe(parts, args.rounds), **sizes, 'rows': []}
    if args.save:
        record.save(args.save, result)            # an error before the measurement, which takes long
    for name in parts:
        print(f"measuring {name}", file=sys.stderr)
        for row in PARTS[name](args):
            if 'peer' in row:
                row['ratio'] = row['project'] / row['peer']
            result['rows'].append(row)
        if args.save:
            record.save(args.save, result)
    print(json.dumps(result, indent=2) if args.json else table(result['rows']))


def table(rows: list[dict]) -> str:
    """Returns the rows as text: what was measured, this project, the peer, the unit, the ratio of both values."""
    lines = [('', 'this project', 'peer', 'unit', 'ratio', '')]
    for row in rows:
        lines.append((row['what'], *(with_spread(row, key) for key in ('project', 'peer')), row['unit'],
                      with_spread(row, 'ratio'), row.get('peer is', '')))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def with_spread(row: dict, key: str) -> str:
    """Returns a value of a row with its lowest and highest round, as 0.50 (0.48-0.53); '' without the value."""
    if key not in row:
        return ''
    digits = 1 if row[key] >= 100 else 2
    low_and_high = '-'.join(f'{value:.{digits}f}' for value in row.get('spread', {}).get(key, ()))
    return f'{row[key]:.{digits}f}' + (f' ({low_and_high})' if low_and_high else '')


if __name__ == '__main__':
    utils.run(main)
