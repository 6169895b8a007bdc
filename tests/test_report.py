"""The statistics of compare_genotypes.py, by hand: means and intervals, tests, correlations, noise."""
import itertools
import json
import math

import numpy as np
import pytest

import genotypes
import report
import results
from utils import UserError

pytest.importorskip('scipy')
pytestmark = pytest.mark.paddle_free


def two_sided_p(t, df):
    """The probability of a larger |t|, by numeric integration of the density of the t distribution."""
    x = np.linspace(-abs(t), abs(t), 200_001)
    density = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi) * (1 + x ** 2 / df) ** (
        -(df + 1) / 2)
    return 1 - float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())


def test_welch_by_hand():
    """Means 2.5 and 6, variances 5 / 3 and 10, n 4 and 5."""
    found = report.welch([1, 2, 3, 4], [2, 4, 6, 8, 10])
    variance = 5 / 3 / 4 + 10 / 5
    assert found['difference'] == -3.5 and found['t'] == pytest.approx(-3.5 / math.sqrt(variance))
    assert found['df'] == pytest.approx(variance ** 2 / ((5 / 12) ** 2 / 3 + 2 ** 2 / 4))
    assert found['p'] == pytest.approx(two_sided_p(found['t'], found['df']), abs=1e-8)
    for bound in (found['low'], found['high']):          # a difference of that size would have p 0.05
        assert two_sided_p((-3.5 - bound) / math.sqrt(variance), found['df']) == pytest.approx(0.05, abs=1e-8)
    assert found['low'] < -3.5 < found['high']


def test_paired_by_hand():
    """Differences 1, 2, 1, -1: mean 0.75, variance 4.75 / 3."""
    found = report.paired([5, 7, 9, 6], [4, 5, 8, 7])
    assert (found['difference'], found['df']) == (0.75, 3)
    assert found['t'] == pytest.approx(0.75 / math.sqrt(4.75 / 3 / 4))
    assert found['p'] == pytest.approx(two_sided_p(found['t'], 3), abs=1e-8)
    half = 3.182446 * math.sqrt(4.75 / 3 / 4)                                                # a table's t, df 3
    assert (found['low'], found['high']) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))


def test_summary_by_hand():
    found = report.summary([1, 2, 3, 4])
    assert (found['n'], found['mean']) == (4, 2.5) and found['deviation'] == pytest.approx(math.sqrt(5 / 3))
    assert found['half'] == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)         # a table's t, df 3


def rows_of(group, **runs_of):
    """Returns rows of a group for {name: top-1 of each training seed}."""
    return [dict(group=group, name=name, seed=seed, top1=top1, weights=0.05, multiply_adds=9.0)
            for name, values in runs_of.items() for seed, top1 in enumerate(values)]


def test_the_seeds_of_a_training_are_averaged_first():
    rows = rows_of('a', a_0=[80, 82], a_1=[84, 86]) + rows_of('random', random_0=[70, 72], random_1=[75, 75])
    assert report.values_of(rows, 'a') == {'a_0': 81, 'a_1': 85}
    assert '| a | 2 | 83.00 | 2.83 | 57.59 to 108.41 | 81.00 | 85.00 |' in report.group_table(rows)
    line = report.test_table(rows, [('a', 'random')], [])[-1]
    expected = report.welch([81, 85], [71, 75])
    interval = '{low:.2f} to {high:.2f}'.format(**expected)
    assert line == (f"| Welch's: a − random | 2 and 2 | +10.00 | {interval} | {expected['t']:.2f} | 2.0 "
                    f"| {expected['p']:.3g} |")


def test_methods_are_paired_by_the_seed_of_the_search():
    rows = rows_of('a', a_10=[5], a_2=[7], a_1=[9], a_7=[99]) + rows_of('b', b_1=[8], b_2=[5], b_10=[4])
    line = report.test_table(rows, [], [('a', 'b')])[-1]
    expected = report.paired([9, 7, 5], [8, 5, 4])
    interval = '{low:.2f} to {high:.2f}'.format(**expected)
    assert line == f"| paired: a − b | 3 pairs | +1.33 | {interval} | {expected['t']:.2f} | 2.0 | {expected['p']:.3g} |"


def test_too_few_genotypes_for_a_test():
    rows = rows_of('a', a_0=[80]) + rows_of('random', random_0=[70], random_1=[75])
    assert 'needs two groups of at least two genotypes' in report.test_table(rows, [('a', 'random')], [])[-1]
    assert 'needs at least two pairs' in report.test_table(rows, [], [('a', 'a')])[-1]
    assert report.test_table(rows, [], []) == []
    assert '| a | 1 | 80.00 |  |  | 80.00 | 80.00 |' in report.group_table(rows)


# ---------------------------------------------------------------------------------------------------
# All searched genotypes as one group

def test_all_searched_genotypes_are_one_more_group():
    rows = rows_of('a', a_0=[80], a_1=[82]) + rows_of('published', x=[50]) + rows_of('b', b_0=[90])
    grouped = report.with_searched(rows, ['a', 'b'])
    assert report.values_of(grouped, 'searched') == {'a_0': 80, 'a_1': 82, 'b_0': 90}
    assert [line.split(' | ')[0] for line in report.group_table(grouped)[2:]] == [
        '| a', '| b', '| searched', '| published']
    assert not report.values_of(report.with_searched(rows, ['a']), 'searched')          # the group is that of a


def test_default_tests():
    groups = ['a', 'b', 'searched', 'published', 'random', 'random-of-size']
    assert report.default_tests(['a', 'b'], groups) == [
        (name, other) for name in ('a', 'b', 'searched') for other in ('random', 'random-of-size')]
    assert report.default_tests(['a'], ['a', 'random']) == [('a', 'random')]
    assert report.default_tests(['a'], ['a', 'published']) == []


# ---------------------------------------------------------------------------------------------------
# Correlations

X, Y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 7.0]


def test_pearson_by_hand():
    """Sums of squares 10 and 21.2, sum of products 12."""
    coefficient, p = report.correlate(X, Y, 'pearson')
    assert coefficient == pytest.approx(12 / math.sqrt(10 * 21.2))
    assert p == pytest.approx(two_sided_p(coefficient * math.sqrt(3 / (1 - coefficient ** 2)), 3), abs=1e-6)


def test_spearman_by_hand():
    """Ranks 2 1 4 3 5: 1 - 6 * 4 / (5 * 24); with the tie 3 = 3 the average rank of both is 2.5."""
    coefficient, p = report.correlate(X, Y, 'spearman')
    assert coefficient == pytest.approx(0.8)
    assert p == pytest.approx(two_sided_p(0.8 * math.sqrt(3 / (1 - 0.64)), 3), abs=1e-6)
    tied = report.correlate([1, 2, 3, 4], [1, 3, 3, 9], 'spearman')[0]
    assert tied == pytest.approx(report.correlate([1, 2, 3, 4], [1, 2.5, 2.5, 4], 'pearson')[0])


def kendall(x, y):
    """tau-b: concordant minus discordant pairs, divided by the root of the pairs without a tie in x and in y."""
    signs = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in itertools.combinations(zip(x, y), 2)]
    return sum(s * t for s, t in signs) / math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))


def test_kendall_by_hand():
    coefficient, p = report.correlate(X, Y, 'kendall')
    assert coefficient == pytest.approx(kendall(X, Y)) == pytest.approx((8 - 2) / 10)
    found = [kendall(X, order) for order in itertools.permutations(Y)]           # of all orders, equally likely
    assert p == pytest.approx(np.mean(np.abs(found) >= 0.6 - 1e-9))
    assert report.correlate([1, 2, 3, 4], [1, 3, 3, 2], 'kendall')[0] == pytest.approx(kendall([1, 2, 3, 4],
                                                                                              [1, 3, 3, 2]))


def test_correlation_with_size_over_all_and_over_random_genotypes():
    rows = rows_of('a', a_0=[90, 92]) + rows_of('random', **{f'random_{seed}': [top1] for seed, top1 in enumerate(Y)})
    for row, weights in zip(rows, [0.9, 0.9, *X]):
        row.update(weights=weights, multiply_adds=-weights)
    table = report.correlation_table(rows)
    for line, size, group, sign in zip(table[2:], ('number of weights',) * 2 + ('multiply-adds',) * 2,
                                       ('all', 'random') * 2, (1, 1, -1, -1)):
        x, y = ([0.9, *X], [91, *Y]) if group == 'all' else (X, Y)
        pearson, spearman = (report.correlate([sign * value for value in x], y, name)
                             for name in ('pearson', 'spearman'))
        assert line == (f'| {size} | {group} | {len(x)} | {pearson[0]:+.2f} | {pearson[1]:.3g} | {spearman[0]:+.2f} '
                        f'| {spearman[1]:.3g} |')


def test_too_few_genotypes_for_a_correlation():
    rows = rows_of('random', random_0=[80], random_1=[81], random_2=[82])                    # of equal size
    assert all('| 3 | a correlation needs at least three genotypes that differ |' in line
               for line in report.correlation_table(rows)[2:])
    with pytest.raises(ValueError, match='at least three'):
        report.correlate([1, 2], [1, 2], 'kendall')


# ---------------------------------------------------------------------------------------------------
# Noise

def test_seed_noise_by_hand():
    """Squares (1 + 1) + (4 + 0 + 4) over 1 + 2 degrees of freedom; a genotype with one seed has none."""
    rows = rows_of('a', a_0=[80, 82]) + rows_of('random', random_0=[70, 72, 74], random_1=[99])
    assert report.seed_noise(rows) == {'deviation': pytest.approx(math.sqrt(10 / 3)), 'df': 3, 'genotypes': 2}
    assert report.seed_noise(rows + rows) == report.seed_noise(rows)             # a group more, or a run twice


def test_the_noise_is_next_to_the_deviation_between_genotypes():
    rows = rows_of('random', random_0=[70, 72, 74], random_1=[75])
    first = [row for row in rows if row['seed'] == 0]
    assert report.noise_table(first, rows)[2:] == [
        '| training seeds of a genotype, pooled over 1 | 2.00 | 2 |', '| training seeds of random_0 | 2.00 | 2 |',
        f'| genotypes of random | {5 / math.sqrt(2):.2f} | 1 |']
    assert report.noise_table(first, first) == []


# ---------------------------------------------------------------------------------------------------
# The file of results

def training(name, seed, top1, **settings):
    return {'kind': 'train', 'name': name, 'seed': seed, 'settings': {'epochs': 3, **settings}, 'seconds': 1.0,
            'genotype': genotypes.DARTS_V1._asdict(), 'accuracy': [0.1, top1], 'weights': 0.05, 'multiply_adds': 9.0}


def write(path, *lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


SEARCH = {'kind': 'search', 'name': 'a', 'seed': 0, 'settings': {}, 'genotype': genotypes.DARTS_V1._asdict()}


def test_the_groups_and_common_seeds_of_a_file(tmp_path):
    names = 'random_1000', 'b_0', 'random_999', 'a_0'
    path = write(tmp_path / 'results.jsonl', SEARCH, *(training(name, 1, 0.5) for name in names),
                 *(training('b_0', seed, 0.25) for seed in (0, 2)))
    found = results.read_experiment(path)
    assert [(row['name'], row['group']) for row in found.rows] == [
        ('a_0', 'a'), ('b_0', 'published'), ('random_999', 'random'), ('random_1000', 'random-of-size')]
    assert {(row['seed'], row['top1']) for row in found.rows} == {(1, 50.0)}
    assert [row['seed'] for row in found.runs if row['name'] == 'b_0'] == [0, 1, 2]
    assert found.methods == ['a'] and not found.rankings


def test_files_that_are_no_experiment(tmp_path):
    for name, lines, reason in (('seeds', [training('x', 0, 0.5), training('y', 1, 0.5)], 'no training seed is common'),
                                ('none', [SEARCH], 'no training seed is common'),
                                ('settings', [training('x', 0, 0.5), training('y', 0, 0.5, epochs=4)],
                                 'have different settings')):
        with pytest.raises(UserError, match=reason):
            results.read_experiment(write(tmp_path / name, *lines))
