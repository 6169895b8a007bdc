"""Writes tables of results into the READMEs, between markers, from the files in scripts/bench/results. Needs no Paddle.

    python scripts/bench/readme_tables.py              # rewrites README.md (Chinese) and README_en.md (English)
    python scripts/bench/readme_tables.py --check      # ends with an error when a README is out of date

A README has the line `<!-- table: KIND NAME -->` before a table and `<!-- end -->` after it. Of the results of
`benchmark.py --save NAME`, the file NAME.json, the kinds are

    steps      time and memory of the steps of search and training, next to PyTorch
    methods    the same of the methods of search, next to first-order DARTS
    machine    the arithmetic of each step and the share of the matrix rate
    phases     the time of each step by phases
    shared     steps next to a busy process
    rows       all rows

and of an experiment of compare_genotypes.py, whose file of finished runs is NAME.jsonl: settings, searches, genotypes,
groups, tests, sizes (correlations), noise, ranking (by the supernets), ranking-means (over the searches of each
method). Chinese terms are those of chinese.py.
"""
from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils

import report
import supernet_ranking
from chinese import chinese
from results import Experiment, read_experiment
from utils import UserError

FOLDER = os.path.join(ROOT, 'scripts', 'bench', 'results')
MARKER = re.compile(r'<!-- *(table: *(?P<kind>[\w-]+) +(?P<name>[\w.-]+)|end) *-->')


# ---------------------------------------------------------------------------------------------------
# Cells

def number(value: float) -> str:
    """Returns a number with three significant digits, or as an integer from 100 on."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f'{value:,.{digits}f}'


def with_spread(row: dict, key: str) -> str:
    """Returns a value of a row with its lowest and highest round, as 0.50 (0.48–0.53); '' without the value."""
    if key not in row:
        return ''
    low_and_high = '–'.join(map(number, row.get('spread', {}).get(key, ())))
    return number(row[key]) + (f' ({low_and_high})' if low_and_high else '')


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table in Markdown; raises ValueError without rows."""
    if not rows:
        raise ValueError("has no rows for it")
    return [f"| {' | '.join(cells)} |" for cells in (head, ['---'] * len(head), *rows)]


# ---------------------------------------------------------------------------------------------------
# Results of the benchmark

def caption(result: dict) -> str:
    """Returns where and how a result was measured: rounds, machine, versions, commit, date, command."""
    machine, versions = result['machine'], result['versions']
    packages = ', '.join(f'{title} {versions[name]}' for name, title in (
        ('paddle', 'PaddlePaddle'), ('torch', 'PyTorch')) if versions.get(name))
    commit, dirty, _ = (result.get('commit') or 'unknown').partition('-dirty')
    flags = ' --avx2' * (machine['environment'].get('ATEN_CPU_CAPABILITY') == 'avx2')
    sizes = ''.join(f' {word}' for word in ['--sizes', *result['sizes']]) if 'sizes' in result else ''
    settings = [f'{name}={value}' for name, value in machine['environment'].items()] if not flags else []
    cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
    parts = [f"median of {result['rounds']} rounds (lowest–highest)", machine['processor'],
             cores, machine['vectors'], f"load {machine['load']:.1f} at the start", *settings,
             packages, f"commit {commit[:7]}" + (' with changes' if dirty else ''), result['date'][:10],
             f"`python scripts/bench/benchmark.py {' '.join(result['parts'])}{flags}{sizes}`"]
    return ', '.join(filter(None, parts))


def measured_steps(result: dict, peer: str | None) -> dict[str, dict]:
    """Returns {step: row with its time}; peer: the beginning of the name of the peer, None for rows without a peer."""
    return {row['what'][:-len(', time')]: row for row in result['rows'] if row['what'].endswith(', time')
            and ('peer' not in row if peer is None else row.get('peer is', '').startswith(peer))}


def compared_steps(result: dict, peer: str, title: str) -> list[str]:
    """Returns the table of the times and the memory of steps next to a peer; title: of the column of the peer."""
    memory = {row['what']: row for row in result['rows'] if 'peer' in row}
    rows = []
    for step, row in measured_steps(result, peer).items():
        of_memory = memory.get(f'{step}, peak memory', {})
        rows.append([step, *(with_spread(row, key) for key in ('project', 'peer', 'ratio')),
                     with_spread(of_memory, 'project'), with_spread(of_memory, 'ratio')])
    return table(['step', 'this project, s', f'{title}, s', 'ratio of times', 'peak memory, GB', 'ratio of memory'],
                 rows)


def steps(result: dict) -> list[str]:
    return compared_steps(result, 'PyTorch', 'PyTorch')


def methods(result: dict) -> list[str]:
    return compared_steps(result, 'DARTS', 'first-order DARTS')


def machine(result: dict) -> list[str]:
    found = {row['what']: row for row in result['rows']}
    rate = [row for what, row in found.items() if what.startswith('matrix rate')]
    columns = {'arithmetic': 'arithmetic, GFLOP', 'time at the matrix rate': 'time at the matrix rate, s',
               'share of the matrix rate': 'share of the matrix rate, %'}
    rows = [[step, with_spread(row, 'project'), *(with_spread(found.get(f'{step}, {name}', {}), 'project')
                                                  for name in columns)]
            for step, row in measured_steps(result, None).items()]
    return table(['step', 'time, s', *columns.values()], rows) + [
        '', *(f"{row['what']}: {number(row['project'])} {row['unit']}" for row in rate)]


def phases(result: dict) -> list[str]:
    shares: dict[str, dict] = {}
    for step in measured_steps(result, None):
        shares[step] = {row['what'][len(step) + 2:]: number(row['project']) for row in result['rows']
                        if row['unit'] == '% of time' and row['what'].startswith(f'{step}, ')}
    names = list(dict.fromkeys(name for found in shares.values() for name in found))
    return table(['step, % of time', *names], [[step, *(found.get(name, '') for name in names)]
                                               for step, found in shares.items()])


def shared(result: dict) -> list[str]:
    ending = ', with a busy process'
    return table(['step', 'alone, s', 'with a busy process, s', 'ratio of times'], [
        [row['what'][:-len(ending)], *(with_spread(row, key) for key in ('peer', 'project', 'ratio'))]
        for row in result['rows'] if row['what'].endswith(ending)])


def all_rows(result: dict) -> list[str]:
    return table(['measured', 'unit', 'this project', 'peer', 'ratio', 'peer is'], [
        [row['what'], row['unit'], *(with_spread(row, key) for key in ('project', 'peer', 'ratio')),
         row.get('peer is', '')] for row in result['rows']])


BENCHMARK_TABLES: dict[str, Callable[[dict], list[str]]] = {
    'steps': steps, 'methods': methods, 'machine': machine, 'phases': phases, 'shared': shared, 'rows': all_rows}


# ---------------------------------------------------------------------------------------------------
# Results of an experiment

def settings(experiment: Experiment) -> list[str]:
    """Returns one line with the sizes of searches and trainings."""
    lines = []
    for what, line in (('search', experiment.searches[:1]), ('training', experiment.trainings[:1])):
        for found in (line[0]['settings'],) if line else ():
            lines.append('{}: {dataset}, C {init_channels}, {layers} cells, {epochs} epochs, batch {batch_size}'.format(
                what, **found))
    seeds = sorted({row['seed'] for row in experiment.rows})
    return ['; '.join([*lines, f"{len({row['name'] for row in experiment.rows})} genotypes",
                       f"{len(seeds)} training seeds"])]


EXPERIMENT_TABLES: dict[str, Callable[[Experiment], list[str]]] = {
    'settings': settings,
    'searches': lambda found: report.method_table(found.searches),
    'genotypes': lambda found: report.genotype_table(found.rows),
    'groups': lambda found: report.group_table(grouped(found)),
    'tests': lambda found: report.test_table(grouped(found), report.default_tests(
        found.methods, {row['group'] for row in grouped(found)}), []),
    'sizes': lambda found: report.correlation_table(found.rows),
    'noise': lambda found: report.noise_table(grouped(found), found.runs),
    'ranking': lambda found: ranking(found),
    'ranking-means': lambda found: ranking_means(found)}


def ranking(experiment: Experiment) -> list[str]:
    return supernet_ranking.ranking_table(experiment.searches, experiment.rows, experiment.rankings)


def ranking_means(experiment: Experiment) -> list[str]:
    """Returns the table of the means over the searches of each method; [] without a method of several searches."""
    lines = ranking(experiment)
    means = [line for line in lines if line.startswith('| mean of ')]
    return lines[:2] + means if means else []


def grouped(experiment: Experiment) -> list[dict]:
    return report.with_searched(experiment.rows, experiment.methods)


# ---------------------------------------------------------------------------------------------------
# READMEs

def make(kind: str, name: str, folder: str) -> list[str]:
    """Returns the lines of a table in English; folder: of the results. Raises UserError when there is no such table."""
    if kind in BENCHMARK_TABLES:
        path = os.path.join(folder, f'{name}.json')
        try:
            result = json.loads(utils.read_text(path))
            return [*BENCHMARK_TABLES[kind](result), '', caption(result)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path} {reason}: a table of the kind {kind} cannot be made of it") from None
    if kind in EXPERIMENT_TABLES:
        path = os.path.join(folder, f'{name}.jsonl')
        lines = EXPERIMENT_TABLES[kind](read_experiment(path))
        if not lines:
            raise UserError(f"{path} has no results for a table of the kind {kind}")
        return lines
    raise UserError(f"no table of the kind {kind}: there are {', '.join([*BENCHMARK_TABLES, *EXPERIMENT_TABLES])}")


def translated(line: str) -> str:
    """Returns a line of `make` in Chinese, the cells of a table one by one."""
    if not line.startswith('|'):
        return chinese(line)
    return f"| {' | '.join(chinese(cell.strip()) for cell in line[1:-1].split('|'))} |"


def rewrite(text: str, path: str, folder: str) -> str:
    """Returns the text of a README with the current tables; raises UserError for markers without their counterpart.

    path: of the README; the tables are in English when it ends in _en.md.
    """
    result, opened = [], None
    for number_of_line, line in enumerate(text.split('\n'), 1):
        match = MARKER.fullmatch(line.strip())
        if match and bool(match['kind']) == bool(opened):
            raise UserError(f"{path}, line {number_of_line}: " + (
                f"the table of line {opened} has no <!-- end -->" if opened else "<!-- end --> without a table before"))
        if match or not opened:
            result.append(line)
        if match:
            opened = number_of_line if match['kind'] else None
        if match and opened:
            lines = make(match['kind'], match['name'], folder)
            # The blank lines separate the table from the markers, which are blocks of HTML.
            result += ['', *(lines if path.endswith('_en.md') else map(translated, lines)), '']
    if opened:
        raise UserError(f"{path}: the table of line {opened} has no <!-- end -->")
    return '\n'.join(result)


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('readmes', nargs='*', type=utils.path, metavar='README', help='files to rewrite (README.md README_en.md)',
        default=[os.path.join(ROOT, name) for name in ('README.md', 'README_en.md')])
    add('--results', type=utils.path, default=FOLDER, help='folder of the results (scripts/bench/results)')
    add('--check', type=utils.boolean, default=False, help='write nothing, and fail when a file is out of date')
    args = parser.parse_args()
    texts = {path: utils.read_text(path) for path in args.readmes}
    new = {path: rewrite(text, path, args.results) for path, text in texts.items()}
    outdated = [path for path in texts if texts[path] != new[path]]
    if args.check and outdated:
        raise UserError(f"the tables in {', '.join(outdated)} are out of date: run python "
                        "scripts/bench/readme_tables.py")
    for path in outdated:
        try:
            utils.write_file(path, new[path])
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        print(f"wrote {path}")
    if not outdated:
        print("all tables are up to date")


if __name__ == '__main__':
    utils.run(main)
