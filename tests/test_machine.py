"""The parts of the benchmark that relate steps to the machine: arithmetic, matrix rate, phases, another process."""
import os
import time
from types import SimpleNamespace

import pytest

import benchmark
import machine
import sides
import utils
from engine import custom_ops

DEFAULTS = SimpleNamespace(sizes=None, rounds=3)


# ---------------------------------------------------------------------------------------------------
# Arithmetic

def passes_by_hand(channels, layers):
    """Returns the multiply-adds of a pass of the supernet, as machine.passes: sizes from the paper, cell by cell."""
    stem = 32 * 32 * 3 * channels * 3 * 9
    weights, alphas = 2 * stem, stem                   # images need no gradient
    c_prev_prev = c_prev = 3 * channels
    pixels = 32 * 32
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        channels *= 1 + reduction
        for channels_in, before in ((c_prev_prev, i - 2), (c_prev, i - 1)):
            preprocess = pixels * channels_in * channels            # FactorizedReduce: two halves of the channels
            weights += 3 * preprocess
            alphas += preprocess * (2 if before >= 0 else 1)        # the stem does not depend on alpha
        pixels //= 4 if reduction else 1
        for node in range(4):
            for state in range(2 + node):
                separable = [pixels * (channels * kernel ** 2 + channels ** 2) for kernel in (3, 5)]
                edge = 3 * sum(separable)                           # sep_conv has two, dil_conv one
                if reduction and state < 2:
                    edge += pixels * channels ** 2                  # skip_connect
                weights += 3 * edge
                alphas += edge * (2 if state >= 2 or i + state >= 2 else 1)
        c_prev_prev, c_prev = c_prev, 4 * channels
    return {'weights': weights + 3 * 10 * c_prev, 'alphas': alphas + 2 * 10 * c_prev}


@pytest.mark.parametrize('channels, layers', [     # Paddle 2.6 takes half a minute for the larger one
    (2, 3), pytest.param(4, 5, marks=[pytest.mark.slow, pytest.mark.paddle_free])])
def test_arithmetic_of_a_search_step_is_that_of_its_five_passes(channels, layers):
    counts = passes_by_hand(channels, layers)
    assert machine.passes('search', channels, layers) == counts
    settings = dict(channels=channels, layers=layers, batch_size=7)
    assert machine.operations('search', **settings) == 14 * (3 * counts['weights'] + 2 * counts['alphas'])
    assert machine.operations('search', unrolled=False, **settings) == 14 * sum(counts.values())


def test_arithmetic_of_a_training_step_is_three_times_that_of_a_result():
    with custom_ops.disabled():
        network = sides.make_network(4, 5)
    auxiliary = 4 * 128 * network.cells[3].channels_out + 768 * 128 * 4 + 768 * 10
    stem = 32 * 32 * 12 * 3 * 9
    counted = 3 * (network.multiply_adds + auxiliary) - stem        # images need no gradient
    assert machine.operations('training', 4, 5, 8) == 16 * counted


# ---------------------------------------------------------------------------------------------------
# Parts

def test_the_share_is_that_of_the_fastest_product(monkeypatch):
    ended = []

    def start_side(name, **settings):
        percent = {'pad': 30.0, "Paddle's own operators": 10.0, 'host': 60.0}
        return SimpleNamespace(step=name, answer={'percent': percent}, end=lambda: ended.append(name))
    monkeypatch.setattr(machine, 'Side', start_side)
    monkeypatch.setattr(machine, 'PRODUCT', 100)                    # 2e6 operations
    monkeypatch.setattr(machine, 'operations', lambda task, **settings: 3e6 if task == 'search' else 1e6)
    products = iter(range(1, 100))
    monkeypatch.setattr(machine, 'alternate', lambda sides, rounds: {'project': [4.0, 3.0, 8.0],
                                                                     'product': [2.0, next(products), 5.0]})
    rows = {row['what']: row for row in machine.machine(DEFAULTS)}
    assert len(rows) == 1 + 7 * (len(sides.steps_of('search', None)) + len(sides.steps_of('training', None))) == 64
    name = 'search, first order, C 4, 5 cells, batch 64'
    assert rows[f'{name}, time']['project'] == 4.0 and rows[f'{name}, time']['spread'] == {'project': [3.0, 8.0]}
    values = {what: row['project'] for what, row in rows.items()}
    assert values[f'{name}, arithmetic'] == pytest.approx(0.003)
    assert values['matrix rate, product of 100 x 100'] == pytest.approx(0.002)
    assert values[f'{name}, time at the matrix rate'] == pytest.approx(1.5)
    assert values[f'{name}, share of the matrix rate'] == pytest.approx(37.5)
    assert values['training, C 8, 5 cells, batch 64, share of the matrix rate'] == pytest.approx(12.5)
    assert values[f'{name}, pad'] == 30.0 and values[f'{name}, host'] == 60.0
    assert ended.count('project_search') == 6 and ended[-1] == 'matrix_product'


def test_the_matrix_product_is_a_side():
    side = sides.Side('matrix_product', size=64)
    side.step()
    assert 0 < side.end() < 1 and side.process.returncode == 0      # Paddle alone would take more memory


def state_of(pid):
    with open(f'/proc/{pid}/stat') as file:
        return file.read().rpartition(')')[2].split()[0]


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason="needs Linux")
def test_the_busy_process_computes_only_meanwhile(monkeypatch):
    started, states = [], []
    popen = machine.subprocess.Popen
    monkeypatch.setattr(machine.subprocess, 'Popen', lambda *args: started.append(popen(*args)) or started[0])

    def wait_for(state):
        for _ in range(500):
            if state_of(started[0].pid) == state:
                return True
            time.sleep(0.01)
    with machine.busy_process() as meanwhile:
        assert wait_for('T')
        meanwhile(lambda: states.append(wait_for('R')))
        assert states == [True] and wait_for('T')
    assert started[0].returncode is not None


def test_a_step_next_to_a_busy_process_is_compared_with_the_step_alone(monkeypatch):
    running, measured = [], []

    def start_side(name, **settings):
        return SimpleNamespace(step=lambda: measured.append((name, bool(running))), end=lambda: None)

    @machine.contextlib.contextmanager
    def busy_process():
        def meanwhile(function):
            running.append(True)
            function()
            running.clear()
        yield meanwhile
    monkeypatch.setattr(machine, 'Side', start_side)
    monkeypatch.setattr(machine, 'busy_process', busy_process)
    rows = machine.shared(DEFAULTS)
    assert [row['what'] for row in rows] == [
        'search, second order, C 16, 8 cells, batch 16, with a busy process',
        'search, first order, C 16, 8 cells, batch 16, with a busy process',
        'training, C 36, 20 cells, batch 32, with a busy process']
    assert measured == 8 * [('project_search', True), ('project_search', False)] + 4 * [
        ('project_training', True), ('project_training', False)]
    assert {'project', 'peer', 'ratio'} == set(rows[0]['spread']) and rows[0]['peer is'] == 'alone'


@pytest.mark.parametrize('part', ['machine', 'shared'])
def test_the_parts_are_in_the_benchmark(part):
    assert benchmark.PARTS[part] is getattr(machine, part)


@pytest.mark.slow
@pytest.mark.parametrize('task, settings', [('search', {'unrolled': True}), ('training', {})])
def test_the_phases_are_percentages_of_all_threads(compiled, task, settings):
    if not compiled:
        pytest.skip('the operators of this project could not be compiled')
    side = sides.Side('project_phases', task=task, steps=1, channels=4, layers=3, batch_size=8, **settings)
    side.end()
    percent = side.answer['percent']
    assert {'pad', 'depthwise', 'pointwise', 'normalisation', "Paddle's own operators", 'host'} <= set(percent)
    assert sum(percent.values()) == pytest.approx(100)
    # Paddle's own operators are timed in another step than the phases, which may have been a slower one, and the host
    # has the rest, which can be negative then.
    own, _ = percent.pop("Paddle's own operators"), percent.pop('host')
    assert own > 0 and all(0 <= value < 100 for value in percent.values()) and percent['depthwise'] > 1


def test_phases_of_a_library_without_them_are_an_error(monkeypatch):
    monkeypatch.setattr(custom_ops, 'enabled', lambda: False)
    monkeypatch.setattr(sides, 'prepare_search', lambda **settings: (None, None, lambda: None))
    monkeypatch.setitem(os.environ, 'CXXFLAGS', '')
    with pytest.raises(utils.UserError, match='no phases can be measured'):
        sides.project_phases('search')
