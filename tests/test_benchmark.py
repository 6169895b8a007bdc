"""The benchmark: its processes, results that differ, its rows and table."""
import datetime
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import paddle
import pytest

import benchmark
import gpu
import inputs
import record
import runs
import sides
import utils
from engine import custom_ops

BENCHMARK = 'scripts/bench/benchmark.py'


def rows_of(part, *flags):
    done = runs.run_in_process(BENCHMARK, part, '--rounds', 1, '--json', *flags)
    assert done.returncode == 0, done.stderr
    return {row['what']: row for row in json.loads(done.stdout)['rows']}


def finished_side(memory, **answer):
    """Takes the place of a Side."""
    return SimpleNamespace(answer=answer, step=lambda: None, end=lambda: memory)


# ---------------------------------------------------------------------------------------------------
# Processes

@pytest.fixture
def script(tmp_path, monkeypatch):
    """Replaces the program of a Side."""
    def write(code):
        path = tmp_path / 'side.py'
        path.write_text(f'import sys\nsys.path.insert(0, {os.path.dirname(sides.__file__)!r})\nimport sides\n{code}\n')
        monkeypatch.setattr(sides, '__file__', str(path))
    return write


def test_a_side_takes_one_step_per_request_and_ignores_other_output(script, tmp_path):
    script("print('a line of a library')\n"
           "values = {**sides.json.loads(sys.argv[2]), 'name': sys.argv[1], 'steps': 0}\n"
           "def step():\n    print('another line')\n    open(values['file'], 'a').write('step ')\n"
           "sides.serve(values, step)")
    steps = tmp_path / 'steps.txt'
    side = sides.Side('some_name', file=str(steps))
    assert side.answer['name'] == 'some_name'
    side.step()
    side.step()
    assert steps.read_text() == 'step step '
    assert 0.001 < side.end() < 100 and side.process.returncode == 0


@pytest.mark.parametrize('code, reason', [
    ('sys.exit(3)', 'ended early: exit code 3'),
    ('sides.os.kill(sides.os.getpid(), sides.signal.SIGKILL)', 'try a smaller batch with --sizes')])
def test_a_side_that_ends_early_is_an_error(script, code, reason):
    script(code)
    with pytest.raises(utils.UserError, match=f'some_name.* {reason}'):
        sides.Side('some_name')


def test_sides_are_called_alternately_and_the_first_call_is_not_timed(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(sides.time, 'perf_counter', lambda: next(clock))
    seconds = sides.alternate({'project': lambda: calls.append('project'),
                               'peer': lambda: calls.append('peer') or next(clock)}, 2)
    assert calls == 3 * ['project', 'peer']
    assert seconds == {'project': [1, 1], 'peer': [2, 2]}


# ---------------------------------------------------------------------------------------------------
# Rows

def test_a_median_has_the_spread_of_its_rounds_and_ratios_are_those_of_a_round():
    assert sides.medians({'project': [2.0, 1.0, 4.0], 'peer': [8.0, 2.0, 5.0]}) == {
        'project': 2.0, 'peer': 5.0,
        'spread': {'project': [1.0, 4.0], 'peer': [2.0, 8.0], 'ratio': [0.25, 0.8]}}
    assert sides.medians({'project': [2.0, 1.0]}) == {'project': 1.5, 'spread': {'project': [1.0, 2.0]}}


def test_the_table_states_spread_where_there_is_one():
    rows = [{'what': 'a step, time', 'unit': 's', 'ratio': 0.4, 'peer is': 'PyTorch',
             **sides.medians({'project': [2.0, 1.0, 4.0], 'peer': [800.0, 2.0, 500.0]})},
            {'what': 'memory', 'unit': 'GB', 'project': 123.456}]
    head, *lines = benchmark.table(rows).splitlines()
    assert head.split() == ['this', 'project', 'peer', 'unit', 'ratio']
    assert [part.strip() for part in lines[0].split('  ') if part.strip()] == [
        'a step, time', '2.00 (1.00-4.00)', '500.0 (2.0-800.0)', 's', '0.40 (0.00-0.50)', 'PyTorch']
    assert lines[1].split() == ['memory', '123.5', 'GB']
    assert lines[0].index(' s ') == lines[1].index(' GB')             # columns

def test_start_compares_the_project_with_edge_by_edge(monkeypatch):
    size = {'channels': 2, 'layers': 3}
    side = sides.Side('project_start', **size)                  # a real one, at a size that takes seconds
    project = finished_side(side.end(), **side.answer)
    peer = finished_side(2.0, **dict(side.answer, seconds=1000.0, operators=6000))
    for name, value in (('SMALL_SIZES', ((2, 3),)), ('CHANNELS', 2), ('LAYERS', 3)):
        monkeypatch.setattr(benchmark, name, value)

    def start_side(name, **settings):
        assert settings == size
        return {'project_start': project, 'edge_by_edge_start': peer}[name]
    monkeypatch.setattr(benchmark, 'Side', start_side)

    rows, name = rows_of('start'), 'start, C 2, 3 cells'
    assert set(rows) == {f'{name}, ready', f'{name}, operators', f'{name}, peak memory', 'start at the defaults, ready'}
    for what, value in (('ready', 1000.0), ('operators', 6000), ('peak memory', 2.0)):
        row = rows[f'{name}, {what}']
        assert row['peer'] == value and row['ratio'] == row['project'] / value
    assert rows[f'{name}, operators']['project'] > 100
    assert 0 < rows[f'{name}, ready']['project'] < 1000 and 0.1 < rows[f'{name}, peak memory']['project'] < 20
    assert 'peer' not in rows['start at the defaults, ready']

    line = next(line for line in runs.run_in_process(BENCHMARK, 'start').stdout.splitlines() if 'operators' in line)
    assert line.split('  ')[-1].strip() == 'one pass, edge by edge'
    assert f"  {side.answer['operators'] / 6000:.2f}  " in line

    peer.answer['loss'] = 2 * side.answer['loss']
    done = runs.run_in_process(BENCHMARK, 'start')
    assert done.returncode == 2 and 'do not compute the same: loss differs' in done.stderr and not done.stdout


def test_a_step_is_compared_with_the_fastest_layout(monkeypatch):
    layouts = []

    def start_side(name, weights, layout=None, **settings):
        assert settings == {'channels': 4, 'layers': 5, 'batch_size': 2, 'unrolled': settings['unrolled']}
        layouts.append(layout)
        memory = {None: 1.0, 'contiguous_format': 5.0, 'channels_last': 4.0, 'channels_last compiled': 6.0}[layout]
        return finished_side(memory, loss=2.3, alphas_normal=[[1.0, 2.0]])
    peer_seconds = {'contiguous_format': 3.0, 'channels_last': 2.0, 'channels_last compiled': 2.5}
    monkeypatch.setattr(benchmark, 'Side', start_side)
    monkeypatch.setattr(benchmark, 'alternate', lambda *_: {'project': [0.25, 0.5, 1.0],
                                                            'peer': 3 * [peer_seconds[layouts[-1]]]})

    rows = rows_of('search_step', '--sizes', '4x5x2', '--compile')
    assert layouts == 2 * [None, 'contiguous_format', 'channels_last', 'channels_last compiled']
    for order in ('second', 'first'):
        name = f'search, {order} order, C 4, 5 cells, batch 2'
        row = rows[f'{name}, time']
        assert (row['project'], row['peer'], row['ratio']) == (0.5, 2.0, 0.25)
        assert row['spread'] == {'project': [0.25, 1.0], 'peer': [2.0, 2.0], 'ratio': [0.125, 0.5]}
        assert row['peer is'] == 'PyTorch, channels last'
        assert (rows[f'{name}, peak memory']['project'], rows[f'{name}, peak memory']['peer']) == (1.0, 4.0)


def test_both_sides_of_a_step_have_its_size(monkeypatch):
    started = []
    monkeypatch.setattr(benchmark, 'Side', lambda name, weights, layout=None, **settings: (
        started.append((name, *settings.values())) or finished_side(1.0, loss=2.3)))
    rows = rows_of('training_step', '--sizes', '8x5x64', '16x8x3')
    assert set(started) == {(side, *size) for side in ('project_training', 'pytorch_training')
                            for size in ((8, 5, 64), (16, 8, 3))}
    assert [what for what in rows if 'time' in what] == ['training, C 8, 5 cells, batch 64, time',
                                                         'training, C 16, 8 cells, batch 3, time']


@pytest.mark.slow
@pytest.mark.parametrize('part, steps', [('search_step', 2), ('training_step', 1)])
def test_steps_of_small_networks_are_measured_next_to_pytorch(part, steps):
    pytest.importorskip('torch')
    rows = rows_of(part, '--sizes', '4x3x6')
    assert len(rows) == 2 * steps
    for what, row in rows.items():
        low, high = row['spread']['project'] if 'time' in what else (row['project'], row['project'])
        assert 0 < low <= row['project'] <= high < 60 and row['peer'] > 0 and 'PyTorch' in row['peer is']


def test_methods_are_related_to_first_order_darts(monkeypatch):
    def start_side(name, channels, layers, batch_size, unrolled, partial_channels=1):
        assert (name, channels, layers, batch_size) == ('project_search', 16, 8, 3)
        side = finished_side(8.0 / partial_channels)
        side.step = (unrolled, partial_channels)
        return side
    seconds = {(False, 1): 2.0, (True, 1): 5.0, (False, 4): 0.5, (True, 4): 1.5}
    monkeypatch.setattr(benchmark, 'Side', start_side)
    monkeypatch.setattr(benchmark, 'alternate', lambda steps, rounds: {name: [seconds[step]]
                                                                       for name, step in steps.items()})
    rows = rows_of('methods', '--sizes', '16x8x3')
    assert {what: (row['project'], row['peer']) for what, row in rows.items()} == {
        'DARTS, second order, C 16, 8 cells, batch 3, time': (5.0, 2.0),
        'PC-DARTS, first order, C 16, 8 cells, batch 3, time': (0.5, 2.0),
        'PC-DARTS, second order, C 16, 8 cells, batch 3, time': (1.5, 2.0),
        'DARTS, second order, C 16, 8 cells, batch 3, peak memory': (8.0, 8.0),
        'PC-DARTS, first order, C 16, 8 cells, batch 3, peak memory': (2.0, 8.0),
        'PC-DARTS, second order, C 16, 8 cells, batch 3, peak memory': (2.0, 8.0)}


@pytest.mark.parametrize('found', [2.0, float('nan')])
def test_sides_that_compute_different_results_are_not_compared(found):
    benchmark.check_equal({'loss': 2.31, 'other': 1}, {'loss': 2.3})
    with pytest.raises(utils.UserError, match='do not compute the same: loss differs'):
        benchmark.check_equal({'loss': found}, {'loss': 2.3})
    with pytest.raises(utils.UserError, match='do not compute the same: gradient differs'):
        benchmark.check_equal({'gradient': [[1.0, found]]}, {'gradient': [[1.0, 2.3]]})


def test_input_is_compared_with_separate_transformations(monkeypatch):
    monkeypatch.setattr(inputs, 'IMAGES', 2)
    monkeypatch.setattr(inputs, 'Side', lambda name: finished_side(0.5, percent=1.5))
    rows = {**rows_of('cifar_input'), **rows_of('imagenet_input')}
    assert rows['first-order search, batch 16: waiting for input']['project'] == 1.5
    training = [row for what, row in rows.items() if 'training images' in what]
    assert len(training) == 2
    for row in training:
        assert row['unit'] == 'images/s' and min(row['project'], row['peer']) > 0
        assert row['ratio'] == row['project'] / row['peer']


def test_the_host_part_subtracts_kernels_and_counts_transfers(monkeypatch):
    answer = {'seconds': [0.3, 0.1, 0.2], 'kernels': 0.15, 'operators': 9, 'launches': 7, 'feeds': 5, 'fetches': 1}
    monkeypatch.setattr(gpu, 'Side', lambda name: finished_side(0.5, **answer))
    rows = rows_of('host')
    assert rows['second-order step, empty batch: all']['project'] == pytest.approx(200)
    assert rows['second-order step, empty batch: host, without kernels']['project'] == pytest.approx(50)
    names = 'operators', 'launches', 'feeds', 'fetches'
    assert [rows[f'{name} of a second-order step']['project'] for name in names] == [9, 7, 5, 1]


@pytest.mark.slow
@pytest.mark.skipif(paddle.__version__.startswith('2.'), reason="Paddle 2 takes no empty batch")
def test_the_host_part_measures_a_step():
    side = sides.Side('project_host', rounds=1)
    answer = side.answer
    side.end()
    assert 0 < answer['kernels'] < answer['seconds'][0] < 60
    # Two batches of images and labels, and the bias correction of Adam; loss and accuracies are one vector.
    assert (answer['feeds'], answer['fetches']) == (5, 1)
    assert answer['operators'] > answer['launches'] > 10_000


@pytest.mark.slow
def test_the_memory_part_lists_all_networks():
    rows = rows_of('memory')
    assert len(rows) == 7
    for what, other in (('a search step', 96), ('a training step, CIFAR-10', 96), ('a training step, ImageNet', 128)):
        small, large = (rows[f'memory of {what}, batch {size}']['project'] for size in (64, other))
        assert 1 < small < large and large / small == pytest.approx(other / 64, rel=0.05)


# ---------------------------------------------------------------------------------------------------
# Command line and record

@pytest.mark.parametrize('text', ['16x8', '16x8x1', '0x8x16', '16,8,16', '16x8x16x1'])
def test_a_size_that_cannot_be_read_is_one_line(text):
    runs.assert_one_line(runs.run_in_process(BENCHMARK, 'search_step', '--sizes', text), text, 'as 16x8x64')


def test_a_result_records_where_and_when_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, 'launches', lambda args: [
        {'what': 'launches', 'unit': '', 'project': 1.0, 'peer': 4.0, 'peer is': 'edge by edge'}])
    monkeypatch.setattr(record, 'FOLDER', str(tmp_path / 'results'))
    monkeypatch.setattr(record, 'ENVIRONMENT', {'OMP_NUM_THREADS': '2', 'HOME': '/home/someone'})
    printed = json.loads(runs.output_of(BENCHMARK, 'launches', '--save', 'quiet_hour', '--json', '--rounds', 3))
    saved = json.loads((tmp_path / 'results' / 'quiet_hour.json').read_text())
    assert printed == saved
    assert saved['rows'][0]['ratio'] == 0.25 and (saved['parts'], saved['rounds']) == (['launches'], 3)
    assert saved['machine']['processor'] and saved['machine']['cores'] == utils.cores()
    assert saved['machine']['environment'] == {'OMP_NUM_THREADS': '2'}
    assert saved['versions']['paddle'] == paddle.__version__ and saved['versions']['python']
    assert re.fullmatch(r'([0-9a-f]{40})(-dirty)?', saved['commit'] or 40 * '0')
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(saved['date'])
    assert abs(age.total_seconds()) < 60


def test_a_result_that_cannot_be_saved_is_reported_before_the_measurement(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(record, 'FOLDER', str(tmp_path / 'file'))
    monkeypatch.setitem(benchmark.PARTS, 'launches', lambda args: pytest.fail('measured'))
    runs.assert_one_line(runs.run_in_process(BENCHMARK, 'launches', '--save', 'name'), 'cannot write')
    runs.assert_one_line(runs.run_in_process(BENCHMARK, 'launches', '--save', '../name'), "'../name' is not a name")


def test_avx2_switches_avx512_off_on_both_sides(monkeypatch):
    environment = {'CXXFLAGS': '-g'}
    for module in (sides, record):
        monkeypatch.setattr(module, 'ENVIRONMENT', environment)
    monkeypatch.setitem(benchmark.PARTS, 'launches', lambda args: [])
    monkeypatch.setattr(record, 'features', lambda: ['sse', 'avx2', 'avx512f'])
    assert record.machine()['vectors'] == 'AVX-512'
    printed = json.loads(runs.output_of(BENCHMARK, 'launches', '--avx2', '--json'))
    assert environment['CXXFLAGS'] == '-g -mno-avx512f' and environment['ATEN_CPU_CAPABILITY'] == 'avx2'
    assert environment['ONEDNN_MAX_CPU_ISA'] == 'AVX2'
    assert printed['machine']['vectors'] == 'AVX2' and printed['machine']['environment'] == environment
    monkeypatch.setattr(record, 'features', lambda: ['asimd'])
    runs.assert_one_line(runs.run_in_process(BENCHMARK, 'launches', '--avx2'), 'needs a processor with AVX2')


@pytest.mark.skipif('avx2' not in record.features() or not shutil.which('g++'), reason="needs AVX2 and g++")
def test_avx2_lets_the_operators_use_vectors_of_32_bytes():
    flags = [*custom_ops.FLAGS, sides.AVX2['CXXFLAGS']]
    macros = subprocess.run(['g++', *flags, '-dM', '-E', '-x', 'c++', os.devnull], check=True, capture_output=True,
                            text=True).stdout
    assert '__AVX2__' in macros and '__AVX512F__' not in macros         # as kernels.h selects them
