"""The figures of an experiment: the points, means and lines that they show, and mistakes of their users."""
import json
import math
import os
import statistics
import subprocess
import sys

import pytest

import figures
import genotypes
import results
import runs
from genotypes import DARTS_SPACE

pytest.importorskip('matplotlib')
pytest.importorskip('scipy')
pytestmark = pytest.mark.paddle_free
SCRIPT = 'scripts/bench/figures.py'
TOP1 = {'a_0': (0.90, 0.92), 'a_1': (0.93, 0.95), 'b_0': (0.80, 0.80), 'b_1': (0.82, 0.84), 'DARTS_V2': (0.85, 0.89),
        'random_0': (0.70, 0.72), 'random_1': (0.75, 0.75), 'random_1003': (0.76, 0.78)}


def lines():
    common = {'genotype': genotypes.DARTS_V1._asdict(), 'seconds': 1.0}
    for name, curvature in (('a', {'curvature': 0.5}), ('b', {})):
        for seed in (0, 1):
            history = [{'epoch': epoch, 'skip_connects': epoch % 2, 'entropy_normal': 2.0 - epoch / 10,
                        'entropy_reduce': 2.0, **(curvature if epoch == 2 else {})} for epoch in (1, 2, 3)]
            yield dict(common, kind='search', name=name, seed=seed, history=history,
                       settings={'space': DARTS_SPACE.as_dict(), 'flags': []})
    for number, (name, values) in enumerate(TOP1.items()):
        for seed, top1 in enumerate(values):
            yield dict(common, kind='train', name=name, seed=seed, settings={}, accuracy=[0.1, top1],
                       weights=0.04 + number / 100, multiply_adds=9.0)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / 'results.jsonl'
    found.write_text(''.join(json.dumps(line) + '\n' for line in lines()))
    return found


def axes_of(figure):
    return {axes.get_label(): axes for axes in figure.axes}


def bar_of(container):
    """Returns (x, y, lower end, upper end) of a point with a bar."""
    (x,), (y,) = container.lines[0].get_data()
    (_, low), (_, high) = container.lines[2][0].get_segments()[0]
    return x, y, low, high


def test_points_and_intervals(path):
    axes = axes_of(figures.draw_accuracy(results.read_experiment(str(path))))
    points = {container.get_label(): container for container in axes['genotypes'].containers}
    assert list(points) == list(TOP1)
    for number, (name, values) in enumerate(TOP1.items()):
        mean, deviation = 100 * statistics.mean(values), 100 * statistics.stdev(values)
        assert bar_of(points[name]) == pytest.approx((0.04 + number / 100, mean, mean - deviation, mean + deviation))
    means = {container.get_label(): container for container in axes['groups'].containers}
    assert [text.get_text() for text in axes['groups'].get_xticklabels()] == list(means) == [
        'a', 'b', 'searched', 'published', 'random', 'random-of-size']
    _, mean, low, high = bar_of(means['searched'])                               # 91, 94, 80, 83; t of 3 df: 3.182446
    half = 3.182446 * math.sqrt(statistics.variance([91, 94, 80, 83]) / 4)
    assert (mean, low, high) == pytest.approx((87, 87 - half, 87 + half))
    assert means['published'].lines[0].get_ydata() == [87] and not means['published'].has_yerr
    colours = [container.lines[0].get_color() for container in means.values()]
    markers = [container.lines[0].get_marker() for container in means.values()]
    assert len(set(zip(colours, markers))) == len(set(markers)) == 6


def test_one_training_seed_has_no_bar(tmp_path):
    found = tmp_path / 'results.jsonl'
    first = [line for line in lines() if line['kind'] == 'search' or not line['seed']]
    found.write_text(''.join(json.dumps(line) + '\n' for line in first))
    axes = axes_of(figures.draw_accuracy(results.read_experiment(str(found))))
    assert not any(container.has_yerr for container in axes['genotypes'].containers)


def test_lines_of_the_searches(path):
    experiment = results.read_experiment(str(path))
    axes = axes_of(figures.draw_searches(experiment))
    assert set(axes) == {'skip_connects', 'entropy_normal', 'entropy_reduce', 'curvature'}
    entropy = {line.get_label(): line for line in axes['entropy_normal'].lines}
    assert list(entropy) == ['a_0', 'a_1', 'b_0', 'b_1']
    assert [list(values) for values in entropy['b_1'].get_data()] == [[1, 2, 3], [1.9, 1.8, 1.7]]
    assert entropy['a_0'].get_color() == entropy['a_1'].get_color() != entropy['b_0'].get_color()
    assert entropy['a_0'].get_linestyle() != entropy['a_1'].get_linestyle()
    curvature = [(line.get_label(), list(line.get_xdata())) for line in axes['curvature'].lines]
    assert curvature == [('a_0', [2]), ('a_1', [2])]
    for line in axes['skip_connects'].lines:
        assert [round(value) for value in line.get_ydata()] == [1, 0, 1]
    for search in experiment.searches:
        search['history'] = [{key: line[key] for key in line if key != 'curvature'} for line in search['history']]
    assert 'curvature' not in axes_of(figures.draw_searches(experiment))


def test_equal_results_give_equal_files(path, tmp_path):
    contents = []
    for folder in ('first', 'second'):
        output = runs.output_of(SCRIPT, path, '--out', tmp_path / folder)
        assert output.splitlines() == [f'wrote {tmp_path}/{folder}/{name}.svg' for name in ('accuracy', 'searches')]
        contents.append([(tmp_path / folder / f'{name}.svg').read_bytes() for name in ('accuracy', 'searches')])
    assert contents[0] == contents[1] and all(b'</svg>' in content for content in contents[0])


def test_mistakes(path, tmp_path, monkeypatch):
    runs.assert_one_line(runs.run_in_process(SCRIPT, tmp_path / 'missing.jsonl'), 'missing.jsonl cannot be read')
    runs.assert_one_line(runs.run_in_process(SCRIPT, path, '--out', '/dev/null/x'), 'cannot write', 'another --out')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    runs.assert_one_line(runs.run_in_process(SCRIPT, path), 'cannot plot the accuracies', 'pip install matplotlib')


def test_paddle_is_not_imported(path, tmp_path):
    code = ("import sys; sys.modules['paddle'] = None; sys.path.insert(0, sys.argv.pop(1)); import figures; "
            "figures.main()")
    done = subprocess.run([sys.executable, '-c', code, os.path.dirname(figures.__file__), str(path), '--out',
                           str(tmp_path / 'new')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'new' / 'accuracy.svg').exists()
