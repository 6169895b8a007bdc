"""Draws the figures of an experiment of compare_genotypes.py from its file of finished runs. Needs no Paddle.

    python scripts/bench/figures.py experiment/results.jsonl --out images --format png

accuracy: test top-1 of each genotype over its number of weights, and mean and 95 % interval of each group.
searches: skip connections, entropy of alpha and curvature over the epochs of each search.
"""
from __future__ import annotations

import os
import statistics
import sys
from functools import partial
from typing import TYPE_CHECKING

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils                       # first: it reports a missing package in one line
import report
from results import Experiment, read_experiment
from utils import UserError
from visualize import FORMATS, FRAME, GREY, INK, import_figure

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# Distinguishable with colour vision deficiency (Okabe and Ito); the marker of each group differs too.
METHOD_STYLES = ('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', '^'), ('#E69F00', 'P'), ('#56B4E9', 'X')
STYLES = {report.SEARCHED: (INK, 'h'), 'published': (INK, '*'), 'random': (GREY, 'D'),
          'random-of-size': ('#CC79A7', 'v')}
LINES = '-', '--', ':', '-.'     # of the searches of a method, by seed
HOLLOW = {'random', 'random-of-size'}
WIDTH = 9                        # inches; 900 pixels in a README
PANELS = {'skip_connects': 'skip connections of the normal cell',
          'entropy_normal': 'entropy of alpha, normal cell, nats',
          'entropy_reduce': 'entropy of alpha, reduction cell, nats',
          'curvature': 'curvature: dominant eigenvalue of the Hessian'}


def style_of(group: str, methods: list[str]) -> dict:
    """Returns the settings of matplotlib for the points of a group."""
    colour, marker = STYLES.get(group) or METHOD_STYLES[methods.index(group) % len(METHOD_STYLES)]
    return dict(color=colour, marker=marker, markersize={'*': 10}.get(marker, 6), linestyle='',
                markerfacecolor='white' if group in HOLLOW else colour, markeredgecolor=colour)


def prepare(axes: matplotlib.axes.Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.spines[:].set(color=FRAME, linewidth=1.2)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.grid(color=FRAME, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_accuracy(experiment: Experiment) -> matplotlib.figure.Figure:
    """Plots top-1 over the number of weights, a point per genotype, and the mean of each group with its 95 % interval.

    A point is the mean over the training seeds, its bar one standard deviation over them. The labels of the axes are
    'genotypes' and 'groups', the label of a point or a mean is its genotype or group. Raises UserError without
    matplotlib or scipy.
    """
    figure = import_figure('the accuracies')(figsize=(WIDTH, 4.6), layout='constrained', dpi=100)
    scatter, means = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    scatter.set_label('genotypes')
    means.set_label('groups')
    prepare(means, 'groups: mean and 95 % interval')
    rows = report.with_searched(experiment.rows, experiment.methods)
    seeds = len({row['seed'] for row in rows})
    prepare(scatter, f'genotypes: mean and standard deviation over {seeds} training seeds' if seeds > 1 else
            'genotypes: one training each')
    groups = list(dict.fromkeys(row['group'] for row in rows))
    handles = []
    for number, group in enumerate(groups):
        style = style_of(group, experiment.methods)
        values = report.values_of(rows, group)
        for name, value in values.items() if group != report.SEARCHED else ():
            found = [row for row in rows if row['group'] == group and row['name'] == name]
            top1 = [row['top1'] for row in found]
            scatter.errorbar(found[0]['weights'], value, statistics.stdev(top1) if len(top1) > 1 else None,
                             elinewidth=1, label=name, zorder=3 if group in experiment.methods else 2, **style)
        means.plot([number] * len(values), list(values.values()), **dict(style, markersize=3.5, alpha=0.45))
        found = report.summary(list(values.values()))
        handle = means.errorbar(number + 0.25, found['mean'], found['half'] if found['n'] > 1 else None, elinewidth=2,
                                capsize=4, label=group, **style)
        handles += [handle] if group != report.SEARCHED else []
    scatter.set_xlabel('weights, M', color=INK)
    scatter.set_ylabel('test top-1, %', color=INK)
    means.grid(axis='x', visible=False)
    means.set_xlim(-0.6, len(groups) - 0.15)
    means.set_xticks([number + 0.1 for number in range(len(groups))], groups, rotation=35, ha='right',
                     rotation_mode='anchor')
    figure.legend(handles=handles, loc='outside upper center', ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_searches(experiment: Experiment) -> matplotlib.figure.Figure:
    """Plots skip connections, entropy of alpha and curvature over the epochs, a line per search.

    The label of each axes is the key in the history, that of a line METHOD_SEED. The curvature has a panel when a
    search has evaluated it. Raises UserError without matplotlib.
    """
    panels = [key for key in PANELS if any(key in line for search in experiment.searches for line in search['history'])]
    columns = 2 if len(panels) in (2, 4) else max(1, len(panels))
    rows = -(-len(panels) // columns)
    figure = import_figure('the searches')(figsize=(WIDTH, 0.5 + 2.6 * max(1, rows)), layout='constrained', dpi=100)
    handles, axes = {}, None
    for number, key in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1, label=key, sharex=axes)
        prepare(axes, PANELS[key])
        for place, search in enumerate(experiment.searches):
            points = {line['epoch']: line[key] for line in search['history'] if key in line}
            style = dict(style_of(search['name'], experiment.methods), linewidth=1.3, markersize=4.5, markevery=[-1])
            before = [other for other in experiment.searches[:place] if other['name'] == search['name']]
            # Integers of several searches coincide: each line is a little higher than the one before.
            shift = 0.25 * (place / len(experiment.searches) - 0.5) if key == 'skip_connects' else 0
            if points:
                line, = axes.plot(list(points), [value + shift for value in points.values()], **dict(
                    style, linestyle=LINES[len(before) % len(LINES)], label=f"{search['name']}_{search['seed']}"))
                handles.setdefault(search['name'], line)
        axes.set_xlabel('epoch', fontsize=9, color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if key == 'skip_connects':
            axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles=list(handles.values()), labels=list(handles), loc='outside upper center',
                  ncols=max(1, len(handles)), frameon=False, fontsize=9, title='a line per search, its style by seed',
                  title_fontsize=9)
    return figure


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('results', type=utils.path, help='results.jsonl of compare_genotypes.py')
    add('--out', type=utils.path, help='folder for the figures (that of the results)')
    add('--format', choices=FORMATS, default='svg', help='format of the figures (%(default)s)')
    args = parser.parse_args()
    experiment = read_experiment(args.results)
    figures = {'accuracy': draw_accuracy(experiment)}
    if any(search.get('history') for search in experiment.searches):
        figures['searches'] = draw_searches(experiment)
    import matplotlib
    for name, figure in figures.items():
        path = os.path.join(args.out or os.path.dirname(args.results), f'{name}.{args.format}')
        # Twice the resolution of a README. The date and random names would change the file without other results.
        metadata = {'Date': None} if args.format == 'svg' else {}
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with matplotlib.rc_context({'svg.hashsalt': name}):
                utils.write_file(path, partial(figure.savefig, format=args.format, dpi=200, metadata=metadata))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; give another --out") from None
        print(f"wrote {path}")


if __name__ == '__main__':
    utils.run(main)
