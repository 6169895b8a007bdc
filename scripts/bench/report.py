"""Statistics of compare_genotypes.py: groups of genotypes, tests between them, tables in Markdown.

The runs of one genotype with several training seeds are not independent: their mean is one value, so that n is the
number of genotypes. A row is a dict with name, group, seed (of the training), top1 (percent), weights and
multiply_adds. Distributions come from scipy (pip install scipy).
"""
from __future__ import annotations

import math
import statistics

import genotypes
import utils


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
    """Welch's test of equal means of two independent groups, two-sided: difference of the means, t, df, p."""
    if min(len(a), len(b)) < 2 or not statistics.pvariance(a) + statistics.pvariance(b):
        raise ValueError("Welch's test needs two groups of at least two genotypes that differ")
    return _as_dict(a, b, import_scipy().ttest_ind(a, b, equal_var=False))


def paired(a: list[float], b: list[float]) -> dict:
    """The paired test of equal means of a[i] and b[i], two-sided: as `welch`."""
    if len(a) < 2 or not statistics.pvariance([x - y for x, y in zip(a, b)]):
        raise ValueError("the paired test needs at least two pairs whose differences differ")
    return _as_dict(a, b, import_scipy().ttest_rel(a, b))


def _as_dict(a: list[float], b: list[float], result) -> dict:
    """Returns the difference of the means of a and b, and t, df and p of scipy's result of a test."""
    return {'difference': statistics.mean(a) - statistics.mean(b), 't': float(result.statistic),
            'df': float(result.df), 'p': float(result.pvalue)}


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
    lines = ['| test | n | difference, points | t | df | p |', '| --- | --- | --- | --- | --- | --- |']
    for test, (first, second) in [*((welch, pair) for pair in compared), *((paired, pair) for pair in pairs)]:
        a, b = (values_of(rows, group) for group in (first, second))
        if test is paired:
            a, b = ({name.rpartition('_')[2]: value for name, value in values.items()} for values in (a, b))
            seeds = sorted(set(a) & set(b), key=int)
            a, b = ({seed: values[seed] for seed in seeds} for values in (a, b))
        count = f'{len(a)} pairs' if test is paired else f'{len(a)} and {len(b)}'
        try:
            result = '{difference:+.2f} | {t:.2f} | {df:.1f} | {p:.3g}'.format(**test(list(a.values()),
                                                                                   list(b.values())))
        except ValueError as error:
            result = f'{error} | | |'
        name = 'paired' if test is paired else "Welch's"
        lines.append(f"| {name}: {first} − {second} | {count} | {result} |")
    return lines if len(lines) > 2 else []
