"""The tables of the READMEs: that they are those of the results, what a table holds, markers, mistakes."""
import json
import os
import subprocess
import sys

import pytest

import genotypes
import readme_tables
import report
import runs
import sides
from chinese import chinese
from genotypes import DARTS_SPACE
from results import read_experiment

pytestmark = pytest.mark.paddle_free
SCRIPT = 'scripts/bench/readme_tables.py'
STEP = 'search, second order, C 16, 8 cells, batch 64'
ROWS = [
    {'what': f'{STEP}, time', 'unit': 's', 'ratio': 0.5, 'peer is': 'PyTorch, channels last',
     **sides.medians({'project': [1.0, 2.5, 3.0], 'peer': [4.0, 5.0, 10.0]})},
    {'what': f'{STEP}, peak memory', 'unit': 'GB', 'project': 0.25, 'peer': 1.0, 'ratio': 0.25, 'peer is': 'PyTorch'},
    {'what': 'PC-DARTS, first order, C 4, 5 cells, batch 64, time', 'unit': 's', 'project': 0.0123, 'peer': 0.0246,
     'ratio': 0.5, 'peer is': 'DARTS, first order'},
    {'what': 'matrix rate, product of 2048 x 2048', 'unit': 'GFLOP/s', 'project': 150.4},
    {'what': f'{STEP}, time', 'unit': 's', 'project': 2.0},
    {'what': f'{STEP}, arithmetic', 'unit': 'GFLOP', 'project': 1234.5},
    {'what': f'{STEP}, time at the matrix rate', 'unit': 's', 'project': 1.0},
    {'what': f'{STEP}, share of the matrix rate', 'unit': '%', 'project': 50.0},
    {'what': f'{STEP}, pools', 'unit': '% of time', 'project': 7.77},
    {'what': f"{STEP}, Paddle's own operators", 'unit': '% of time', 'project': 0.0},
    {'what': f'{STEP}, with a busy process', 'unit': 's', 'project': 3.0, 'peer': 2.0, 'ratio': 1.5,
     'peer is': 'alone'}]
RESULT = {'machine': {'processor': 'Some CPU', 'cores': 2, 'vectors': 'AVX2', 'load': 0.04,
                      'environment': {'OMP_NUM_THREADS': '2'}},
          'versions': {'project': '0.2.0', 'python': '3.11.7', 'paddle': '3.3.1', 'torch': None, 'numpy': '2.0'},
          'commit': 40 * 'a' + '-dirty', 'date': '2026-11-27T10:00:00+00:00', 'parts': ['search_step', 'machine'],
          'rounds': 3, 'rows': ROWS}
CAPTION = ('median of 3 rounds (lowest–highest), Some CPU, 2 cores, AVX2, load 0.0 at the start, OMP_NUM_THREADS=2, '
           'PaddlePaddle 3.3.1, commit aaaaaaa with changes, 2026-11-27, '
           '`python scripts/bench/benchmark.py search_step machine`')


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with the results quiet.json and fashion.jsonl."""
    (tmp_path / 'quiet.json').write_text(json.dumps(RESULT))
    common = {'genotype': genotypes.DARTS_V1._asdict(), 'seconds': 1.0}
    sizes = {'dataset': 'fashion_mnist', 'init_channels': 4, 'layers': 5, 'epochs': 7, 'batch_size': 64}
    mixing = {f'alphas_{kind}': 14 * [[column / 28 for column in range(8)]] for kind in ('normal', 'reduce')}
    lines = [dict(common, kind='search', name='a', seed=seed, history=[], mixing=mixing,
                  settings=dict(sizes, space=DARTS_SPACE.as_dict(), flags=['--unrolled', 'False'])) for seed in (0, 1)]
    names = 'a_0', 'a_1', 'DARTS_V1', 'random_0', 'random_1', 'random_1001'
    for number, name in enumerate(names):
        genotype = genotypes.draw(DARTS_SPACE, number)._asdict()
        lines += [dict(common, kind='train', name=name, seed=seed, settings=sizes, genotype=genotype,
                       accuracy=[0.8 + (number + seed) / 100], weights=0.05 + number / 100,
                       multiply_adds=9.0 + number % 3) for seed in (0, 1)]
    (tmp_path / 'fashion.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return tmp_path


def test_the_readmes_are_up_to_date():
    pytest.importorskip('scipy')                       # for the tables of an experiment
    assert runs.output_of(SCRIPT, '--check') == "all tables are up to date\n"


@pytest.mark.parametrize('kind, lines', [
    ('steps', ['| step | this project, s | PyTorch, s | ratio of times | peak memory, GB | ratio of memory |',
               '| --- | --- | --- | --- | --- | --- |',
               f'| {STEP} | 2.50 (1.00–3.00) | 5.00 (4.00–10.0) | 0.500 (0.250–0.500) | 0.250 | 0.250 |']),
    ('methods', ['| step | this project, s | first-order DARTS, s | ratio of times | peak memory, GB '
                 '| ratio of memory |', '| --- | --- | --- | --- | --- | --- |',
                 '| PC-DARTS, first order, C 4, 5 cells, batch 64 | 0.0123 | 0.0246 | 0.500 |  |  |']),
    ('machine', ['| step | time, s | arithmetic, GFLOP | time at the matrix rate, s | share of the matrix rate, % |',
                 '| --- | --- | --- | --- | --- |', f'| {STEP} | 2.00 | 1,234 | 1.00 | 50.0 |', '',
                 'matrix rate, product of 2048 x 2048: 150 GFLOP/s']),
    ('phases', ["| step, % of time | pools | Paddle's own operators |", '| --- | --- | --- |',
                f'| {STEP} | 7.77 | 0 |']),
    ('shared', ['| step | alone, s | with a busy process, s | ratio of times |', '| --- | --- | --- | --- |',
                f'| {STEP} | 2.00 | 3.00 | 1.50 |'])])
def test_tables_of_the_benchmark(folder, kind, lines):
    assert readme_tables.make(kind, 'quiet', str(folder)) == [*lines, '', CAPTION]


def test_all_rows_of_the_benchmark(folder):
    lines = readme_tables.make('rows', 'quiet', str(folder))
    assert len(lines) == 2 + len(ROWS) + 2
    assert lines[-3] == f'| {STEP}, with a busy process | s | 3.00 | 2.00 | 1.50 | alone |'


def test_a_result_without_avx512(folder):
    changed = dict(RESULT, commit=None, versions={}, machine=dict(
        RESULT['machine'], cores=1, vectors=None, environment={'ATEN_CPU_CAPABILITY': 'avx2', 'CXXFLAGS': 'x'}))
    assert readme_tables.caption(changed) == (
        'median of 3 rounds (lowest–highest), Some CPU, 1 core, load 0.0 at the start, commit unknown, 2026-11-27, '
        '`python scripts/bench/benchmark.py search_step machine --avx2`')


def test_the_named_genotype_is_the_most_accurate_of_the_searches():
    found = read_experiment(os.path.join(readme_tables.FOLDER, 'evidence.jsonl'))
    best = max((row for row in found.rows if row['group'] in found.methods), key=lambda row: row['top1'])
    assert genotypes.FASHION_MNIST == genotypes.check(best['genotype'])


def test_numbers():
    values = {0.000123: '0.000123', 0.0999: '0.0999', 1: '1.00', 9.876: '9.88', 99.94: '99.9', 150.4: '150',
              12345.6: '12,346', 0: '0', -2.5: '-2.50'}
    assert {value: readme_tables.number(value) for value in values} == values


def test_tables_of_an_experiment(folder):
    pytest.importorskip('scipy')
    make = {kind: readme_tables.make(kind, 'fashion', str(folder)) for kind in readme_tables.EXPERIMENT_TABLES}
    assert make['settings'] == [
        'search: fashion_mnist, C 4, 5 cells, 7 epochs, batch 64; training: fashion_mnist, C 4, 5 cells, 7 epochs, '
        'batch 64; 6 genotypes; 2 training seeds']
    assert make['genotypes'][2] == '| a | a_0 | 80.50 ± 0.71 | 0.050 | 9.0 |'
    found = read_experiment(str(folder / 'fashion.jsonl'))
    assert make['groups'] == report.group_table(found.rows)                    # one method: no group of all searched
    assert make['tests'] == report.test_table(found.rows, [('a', 'random'), ('a', 'random-of-size')], [])
    assert make['sizes'] == report.correlation_table(found.rows)
    assert make['noise'] == report.noise_table(found.rows, found.rows) and len(make['noise']) == 2 + 1 + 2
    assert make['searches'][2].startswith('| a | --unrolled False | 2 |')
    assert [line.split(' |')[0] for line in make['ranking'][2:]] == ['| a_0', '| a_1', '| mean of a']
    assert make['ranking-means'] == [*make['ranking'][:2], make['ranking'][4]]


@pytest.mark.parametrize('english, expected', [
    (f'| {STEP} | 2.50 (1.00–3.00) |', '| 搜索，二阶，C 16，8 个单元，批大小 64 | 2.50 (1.00–3.00) |'),
    ('| test top-1, % | 95 % interval of the mean |', '| 测试 top-1（%） | 均值的 95% 区间 |'),
    ("| Welch's: second − random | 3 and 12 | 90.77 to 91.35 |",
     '| Welch 检验：second − 随机 | 3 和 12 | 90.77 至 91.35 |'),
    ('| training seeds of a genotype, pooled over 30 | genotypes of searched |',
     '| 同一 genotype 的训练种子，合并 30 个 | 搜索得到（合计） 的 genotype |'),
    ('| 600,000 | --unrolled False |  |', '| 600,000 | --unrolled False |  |'),
    (CAPTION, '3 轮的中位数（最低–最高），Some CPU，2 核，AVX2，开始时负载 0.0，OMP_NUM_THREADS=2，PaddlePaddle 3.3.1，'
              '提交 aaaaaaa（有改动），2026-11-27，`python scripts/bench/benchmark.py search_step machine`')])
def test_chinese(english, expected):
    assert readme_tables.translated(english) == expected


def test_headings_have_a_translation(folder):
    """Apart from names and letters."""
    pytest.importorskip('scipy')
    untranslated = {'flags', 'n', 't', 'df', 'p', 'Pearson', 'Spearman', 'genotype', 'skip_connect', 'PyTorch（s）'}
    for kind in {*readme_tables.BENCHMARK_TABLES, *readme_tables.EXPERIMENT_TABLES} - {'settings'}:
        name = 'quiet' if kind in readme_tables.BENCHMARK_TABLES else 'fashion'
        for cell in readme_tables.make(kind, name, str(folder))[0].strip('| ').split(' | '):
            assert any(letter > '\u4e00' for letter in chinese(cell)) or chinese(cell) in untranslated or \
                cell.startswith('log alpha'), cell


def test_tables_are_written_between_markers(folder, tmp_path):
    pytest.importorskip('scipy')
    text = ('# Title\n\n<!-- table: steps quiet -->\nold\n\n| old |\n<!-- end -->\nbetween\n\n'
            '<!-- table: groups fashion -->\n<!-- end -->\n')
    paths = [tmp_path / name for name in ('README.md', 'README_en.md')]
    for path in paths:
        path.write_text(text)
    flags = [*paths, '--results', folder]
    runs.assert_one_line(runs.run_in_process(SCRIPT, *flags, '--check'),
                         f'the tables in {paths[0]}, {paths[1]} are out of date', 'scripts/bench/readme_tables.py')
    assert paths[0].read_text() == text
    assert runs.output_of(SCRIPT, *flags).splitlines() == [f'wrote {path}' for path in paths]
    written = paths[1].read_text()
    assert written.startswith('# Title\n\n<!-- table: steps quiet -->\n\n| step | this project, s |')
    assert f'\n\n{CAPTION}\n\n<!-- end -->\nbetween\n\n<!-- table: groups fashion -->\n\n| group |' in written
    assert written.endswith('|\n\n<!-- end -->\n') and 'old' not in written
    assert '| 一步 | 本项目（s） | PyTorch（s） |' in paths[0].read_text()
    for check in ([], ['--check']):
        assert runs.output_of(SCRIPT, *flags, *check) == 'all tables are up to date\n'
    (folder / 'quiet.json').write_text(json.dumps(dict(RESULT, rounds=4)))
    assert runs.run_in_process(SCRIPT, *flags, '--check').returncode == 2


@pytest.mark.parametrize('text, reason', [
    ('<!-- table: steps quiet -->\n', 'the table of line 1 has no <!-- end -->'),
    ('a\n<!-- table: steps quiet -->\n<!-- table: steps quiet -->\n<!-- end -->',
     'line 3: the table of line 2 has no <!-- end -->'),
    ('<!-- end -->', 'line 1: <!-- end --> without a table'),
    ('<!-- table: stairs quiet -->\n<!-- end -->', 'no table of the kind stairs: there are steps, methods'),
    ('<!-- table: steps missing -->\n<!-- end -->', 'missing.json cannot be read'),
    ('<!-- table: groups quiet -->\n<!-- end -->', 'quiet.jsonl cannot be read'),
    ('<!-- table: steps empty -->\n<!-- end -->', 'empty.json has no rows for it'),
    ('<!-- table: steps damaged -->\n<!-- end -->', "damaged.json lacks 'rows'"),
    ('<!-- table: noise once -->\n<!-- end -->', 'once.jsonl has no results for a table of the kind noise')])
def test_mistakes_are_one_line(folder, text, reason):
    (folder / 'empty.json').write_text(json.dumps(dict(RESULT, rows=[])))
    (folder / 'damaged.json').write_text('{}')
    lines = (folder / 'fashion.jsonl').read_text().splitlines()
    (folder / 'once.jsonl').write_text('\n'.join(line for line in lines if json.loads(line)['seed'] == 0))
    path = folder / 'README_en.md'
    path.write_text(text)
    runs.assert_one_line(runs.run_in_process(SCRIPT, path, '--results', folder), reason)
    assert path.read_text() == text


def test_paddle_is_not_imported(folder):
    (folder / 'README.md').write_text('<!-- table: steps quiet -->\n<!-- end -->\n')
    code = ("import sys; sys.modules['paddle'] = None; sys.path.insert(0, sys.argv.pop(1)); import readme_tables; "
            "readme_tables.main()")
    done = subprocess.run([sys.executable, '-c', code, os.path.dirname(readme_tables.__file__),
                           str(folder / 'README.md'), '--results', str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
