"""Statistics of compare_genotypes.py: groups of genotypes, tests, correlations and noise, tables in Markdown.

The runs of one genotype with several training seeds are not independent: their mean is one value, so that n is the
number of genotypes. A row is a dict with name, group, seed (of the training), top1 (percent), weights and
multiply_adds (millions). The genotypes of all methods together are one more group, SEARCHED. Distributions come from
scipy (pip install scipy).
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Collection

import genotypes
import utils

SEARCHED = 'searched'
RANDOM_GROUPS = 'random', 'random-of-size'
SIZES = {'weights': 'number of weights', 'multiply_adds': 'multiply-adds'}


def import_scipy():
    """Returns the module scipy.stats; raises UserError when it is not installed."""
    try:
        import scipy.stats
    except ImportError as error:
        raise utils.UserError(f"cannot compute the tests: {error}; install scipy with pip install scipy") from None
    return scipy.stats


def values_of(rows: list[dict], group: str) -> dict[str, float]:
    """Returns {name of a genotype: mean top-1 over its training seeds} of a group."""
    runs: dict[str, list] = {}
    for row in rows:
        if row['group'] == group:
            runs.setdefault(row['name'], []).append(row['top1'])
    return {name: statistics.mean(values) for name, values in runs.items()}


def with_searched(rows: list[dict], methods: Collection[str]) -> list[dict]:
    """Returns the rows, and with several methods those of all of them once more as the group SEARCHED."""
    of_methods = [row for row in rows if row['group'] in methods]
    again = [dict(row, group=SEARCHED) for row in of_methods] if len(methods) > 1 else []
    return of_methods + again + [row for row in rows if row['group'] not in methods]


def default_tests(methods: Collection[str], groups: Collection[str]) -> list[tuple[str, str]]:
    """Returns the pairs of groups to test: every method and SEARCHED against each group of random genotypes.

    groups: those with genotypes.
    """
    return [(name, other) for name in (*methods, SEARCHED) for other in RANDOM_GROUPS if {name, other} <= set(groups)]


def summary(values: list[float]) -> dict:
    """Returns n, mean, standard deviation and the half of the 95 % interval of the mean (t distribution).

    Both are NaN for a single value.
    """
    n, deviation, half = len(values), math.nan, math.nan
    if n > 1:
        deviation = statistics.stdev(values)
        half = float(import_scipy().t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return {'n': n, 'mean': statistics.mean(values), 'deviation': deviation, 'half': half}


def welch(a: list[float], b: list[float]) -> dict:
    """Welch's test of equal means of two independent groups, two-sided.

    Returns the difference of the means, low and high, its 95 % interval, and t, df and p.
    """
    if min(len(a), len(b)) < 2 or not statistics.pvariance(a) + statistics.pvariance(b):
        raise ValueError("Welch's test needs two groups of at least two genotypes that differ")
    return _as_dict(a, b, import_scipy().ttest_ind(a, b, equal_var=False))


def paired(a: list[float], b: list[float]) -> dict:
    """The paired test of equal means of a[i] and b[i], two-sided: as `welch`."""
    if len(a) < 2 or not statistics.pvariance([x - y for x, y in zip(a, b)]):
        raise ValueError("the paired test needs at least two pairs whose differences differ")
    return _as_dict(a, b, import_scipy().ttest_rel(a, b))


def correlate(x: list[float], y: list[float], coefficient: str) -> tuple[float, float]:
    """Returns a correlation of x and y and its two-sided p; coefficient: 'pearson', 'spearman' or 'kendall' (tau-b).

    Raises ValueError for fewer than three pairs, and when all values of x or of y are equal.
    """
    if len(x) < 3 or min(len(set(x)), len(set(y))) < 2:
        raise ValueError("a correlation needs at least three genotypes that differ")
    function = {'pearson': 'pearsonr', 'spearman': 'spearmanr', 'kendall': 'kendalltau'}[coefficient]
    result = getattr(import_scipy(), function)(x, y)
    return float(result.statistic), float(result.pvalue)


def seed_noise(rows: list[dict]) -> dict:
    """Returns the standard deviation of top-1 within a genotype over its training seeds, pooled over the genotypes.

    The deviation has df, the number of runs minus that of `genotypes`, of those with several seeds. It is NaN without
    any.
    """
    runs: dict[str, dict] = {}
    for row in rows:
        runs.setdefault(row['name'], {})[row['seed']] = row['top1']
    repeated = [list(found.values()) for found in runs.values() if len(found) > 1]
    df = sum(len(values) - 1 for values in repeated)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in repeated)
    return {'deviation': math.sqrt(squares / df) if df else math.nan, 'df': df, 'genotypes': len(repeated)}


def _as_dict(a: list[float], b: list[float], result) -> dict:
    """Returns the difference of the means of a and b, and the numbers of scipy's result of a test, as of `welch`."""
    low, high = map(float, result.confidence_interval(0.95))
    return {'difference': statistics.mean(a) - statistics.mean(b), 'low': low, 'high': high,
            't': float(result.statistic), 'df': float(result.df), 'p': float(result.pvalue)}


def method_table(searches: list[dict]) -> list[str]:
    """Returns the lines of the table of the methods: what each search has computed, means over the seeds.

    searches: lines of --results; those of an earlier version lack the numbers of images.
    """
    lines = ['| method | flags | searches | training images seen | images seen by alpha | skip_connect | seconds |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for name in dict.fromkeys(line['name'] for line in searches):
        found = [line for line in searches if line['name'] == name]
        images = [f"{statistics.mean(line[key] for line in found):,.0f}" if all(key in line for line in found) else ''
                  for key in ('images', 'alpha_images')]
        skips = statistics.mean(genotypes.skip_connects(genotypes.check(line['genotype'])) for line in found)
        lines.append(f"| {name} | {' '.join(found[0]['settings']['flags'])} | {len(found)} | {' | '.join(images)} "
                     f"| {skips:.1f} | {statistics.mean(line['seconds'] for line in found):.0f} |")
    return lines if searches else []


def run_table(rows: list[dict]) -> list[str]:
    """Returns the lines of the table of all runs."""
    lines = ['| group | genotype | seed | test top-1, % | weights, M | multiply-adds, M |',
             '| --- | --- | --- | --- | --- | --- |']
    return lines + ['| {group} | {name} | {seed} | {top1:.2f} | {weights:.3f} | {multiply_adds:.1f} |'.format(**row)
                    for row in rows]


def genotype_table(rows: list[dict]) -> list[str]:
    """Returns the lines of the table of the genotypes: mean and standard deviation of top-1 over the training seeds."""
    lines = ['| group | genotype | test top-1, % | weights, M | multiply-adds, M |', '| --- | --- | --- | --- | --- |']
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault((row['group'], row['name']), []).append(row)
    for (group, name), runs in found.items():
        top1 = [row['top1'] for row in runs]
        spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
        lines.append(f"| {group} | {name} | {statistics.mean(top1):.2f}{spread} "
                     "| {weights:.3f} | {multiply_adds:.1f} |".format(**runs[0]))
    return lines


def group_table(rows: list[dict]) -> list[str]:
    """Returns the lines of the table of the groups."""
    lines = ['| group | genotypes | mean | standard deviation | 95 % interval of the mean | lowest | highest |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for group in dict.fromkeys(row['group'] for row in rows):
        values = list(values_of(rows, group).values())
        found = summary(values)
        low, high = found['mean'] - found['half'], found['mean'] + found['half']
        spread = f"{found['deviation']:.2f} | {low:.2f} to {high:.2f}" if len(values) > 1 else ' | '
        lines.append(f"| {group} | {len(values)} | {found['mean']:.2f} | {spread} | {min(values):.2f} "
                     f"| {max(values):.2f} |")
    return lines


def test_table(rows: list[dict], compared: list[tuple], pairs: list[tuple]) -> list[str]:
    """Returns the lines of the table of tests: Welch's between groups, the paired one between methods.

    compared: pairs of groups; pairs: pairs of searched groups, whose genotypes NAME_SEED are paired by the seed of the
    search.
    """
    lines = ['| test | n | difference, points | 95 % interval | t | df | p |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for test, (first, second) in [*((welch, pair) for pair in compared), *((paired, pair) for pair in pairs)]:
        a, b = (values_of(rows, group) for group in (first, second))
        if test is paired:
            a, b = ({name.rpartition('_')[2]: value for name, value in values.items()} for values in (a, b))
            seeds = sorted(set(a) & set(b), key=int)
            a, b = ({seed: values[seed] for seed in seeds} for values in (a, b))
        count = f'{len(a)} pairs' if test is paired else f'{len(a)} and {len(b)}'
        try:
            result = '{difference:+.2f} | {low:.2f} to {high:.2f} | {t:.2f} | {df:.1f} | {p:.3g}'.format(
                **test(list(a.values()), list(b.values())))
        except ValueError as error:
            result = f'{error} | | | |'
        name = 'paired' if test is paired else "Welch's"
        lines.append(f"| {name}: {first} − {second} | {count} | {result} |")
    return lines if len(lines) > 2 else []


def correlation_table(rows: list[dict]) -> list[str]:
    """Returns the lines of the table of correlations of top-1 with the size, over all and over the random genotypes.

    rows: without the group SEARCHED.
    """
    lines = ['| top-1 with | genotypes | n | Pearson | p | Spearman | p |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for size, title in SIZES.items():
        for group in ('all', 'random'):
            found = {row['name']: row for row in rows if group in ('all', row['group'])}
            top1 = [statistics.mean(row['top1'] for row in rows if row['name'] == name) for name in found]
            try:
                cells = ['{:+.2f} | {:.3g}'.format(*correlate([row[size] for row in found.values()], top1, coefficient))
                         for coefficient in ('pearson', 'spearman')]
            except ValueError as error:
                cells = [f'{error} | ', ' | ']
            lines.append(f"| {title} | {group} | {len(found)} | {' | '.join(cells)} |")
    return lines


def noise_table(rows: list[dict], runs: list[dict]) -> list[str]:
    """Returns the lines of the table of the standard deviations of top-1 over training seeds and over genotypes.

    runs: rows of all trainings, also with seeds that only some genotypes were trained with. A genotype with at least
    three seeds has a line. The deviation between genotypes includes the noise, divided by the root of the number of
    seeds. Without a genotype of several seeds there is no table.
    """
    pooled = seed_noise(runs)
    if not pooled['genotypes']:
        return []
    lines = ['| top-1, % | standard deviation | degrees of freedom |', '| --- | --- | --- |',
             '| training seeds of a genotype, pooled over {genotypes} | {deviation:.2f} | {df} |'.format(**pooled)]
    for name in dict.fromkeys(row['name'] for row in runs):
        found = seed_noise([row for row in runs if row['name'] == name])
        if found['df'] > 1:
            lines.append(f"| training seeds of {name} | {found['deviation']:.2f} | {found['df']} |")
    for group in dict.fromkeys(row['group'] for row in rows):
        values = list(values_of(rows, group).values())
        if len(values) > 1:
            lines.append(f"| genotypes of {group} | {statistics.stdev(values):.2f} | {len(values) - 1} |")
    return lines
