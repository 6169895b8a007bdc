"""The compiled operators against Paddle's, and the fallback to Paddle's where they cannot be compiled.

test_model_search.py, test_architect.py and test_model.py compare networks with the references on both operator sets.
"""
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import operations
import utils
from engine import custom_ops, trainer
from engine.parameters import FlatParameters
from engine.programs import StaticProgram, VariableStore
from genotypes import Genotype, SearchSpace, named
from model import Cell, NetworkCIFAR
from model_search import Supernet
from operations import BN_EPSILON, batch_norm, max_pool


pytestmark = pytest.mark.usefixtures('compiled_operators')


def genotype(*names, states=(0, 1, 0, 2, 2, 3), concat=(3, 4)):
    """Returns a genotype with two equal cells, whose edges have the operations `names` alternately.

    By default an input and a node are read twice, and node 3 is both read and in the output.
    """
    edges = tuple((names[n % len(names)], state) for n, state in enumerate(states))
    return Genotype(edges, concat, edges, concat)


def outcome(genotype, height, width, channels=4, reduction=False, reduction_prev=False, training=True, masked=True,
            dtype='float64', exact=False, nan=False, twice=False):
    """Computes a cell of a discrete network with the operator set that is enabled.

    exact: computes random inputs of `dtype` in float64; nan: replaces one pixel of the inputs by NaN.
    Returns {name: array}: the output, the gradients of sum(direction * output), with `twice` of
    sum(direction * output + direction^2 * second output), the updated running statistics.
    """
    rng = np.random.default_rng(0)
    layout = FlatParameters(running_statistics=True)
    cell = Cell(layout, genotype, 'cell', 7, 5, channels, reduction, reduction_prev)
    layout.assign_offsets()
    layout.statistics.assign_offsets()
    scale, stride = 1 + reduction_prev, 1 + reduction
    shapes = {'s0': (7, height * scale, width * scale), 's1': (5, height, width), 'masks': (sum(cell.droppable), 1, 1),
              'direction': (cell.channels_out, height // stride, width // stride)}
    values = {name: rng.normal(size=(3, *shape)) for name, shape in shapes.items()}
    vectors = {'theta': rng.normal(size=layout.size), 'statistics': np.abs(rng.normal(size=layout.statistics.size))}
    if nan:
        values['s0'][0, 0, 3, 3] = np.nan
    store = VariableStore(paddle.CPUPlace(), 'float64' if exact else dtype)
    for name, array in vectors.items():
        store.set(name, array.astype(dtype))

    def build():
        variables = {name: store.input(name, list(array.shape)) for name, array in values.items()}
        theta = store.variable('theta', trainable=True)
        layout.training = training
        layout.unpack(theta, custom_ops.enabled())
        layout.statistics.unpack(store.variable('statistics'), custom_ops.enabled())
        differentiated = [theta, variables['s0'], variables['s1']]
        for variable in differentiated:
            variable.stop_gradient = False
        result, again = cell(*differentiated[1:], variables['masks'] if masked and any(cell.droppable) else None, twice)
        direction = variables['direction']
        total = result * direction if again is None else result * direction + again * direction * direction
        gradients = paddle.static.gradients([paddle.sum(total)], differentiated)
        store.assign('statistics', layout.statistics.pack())
        # The gradient of an input that no path leads to is None.
        return [result, *(paddle.zeros_like(x) if gradient is None else gradient
                          for gradient, x in zip(gradients, differentiated))]
    result, gradient, *input_gradients = StaticProgram(store, build)(
        **{name: array.astype(dtype).astype(store.dtype) for name, array in values.items()})
    return {'output': result, 's0': input_gradients[0], 's1': input_gradients[1], **layout.named(gradient),
            **layout.statistics.named(store.get('statistics'))}


def expected_outcome(*arguments, **settings):
    """Returns `outcome` by Paddle's operators, with an average pool whose gradient is exact in float64 too."""
    def exact_average_pool(x, stride):
        kernel = paddle.ones([x.shape[1], 1, 3, 3], x.dtype)
        total, count = (F.conv2d(image, kernel, None, stride, 1, 1, x.shape[1]) for image in (x, paddle.ones_like(x)))
        return total / count
    with pytest.MonkeyPatch.context() as patch, custom_ops.disabled():
        patch.setitem(operations.OPERATIONS, 'avg_pool_3x3', operations.Operation(pool=exact_average_pool))
        return outcome(*arguments, **settings)


def compare(*arguments, **settings):
    """Asserts that both operator sets have the same `outcome`."""
    result, expected = outcome(*arguments, **settings), expected_outcome(*arguments, **settings)
    assert set(result) == set(expected)
    for name, array in expected.items():
        assert result[name].shape == array.shape
        assert np.abs(result[name] - array).max() < 1e-11 * max(1.0, np.abs(array).max()), (name, *arguments, settings)


@pytest.mark.parametrize('reduction', [False, True])
@pytest.mark.parametrize('name', [name for name, entry in operations.OPERATIONS.items() if entry.compiled])
def test_a_cell_of_one_operation_equals_that_of_paddle(name, reduction):
    # Widths for every vector width, with and without columns beyond the end; heights that are no multiple of a tile.
    sizes = (((4, 4), (8, 6), (8, 8), (6, 14), (32, 32), (4, 34)) if reduction else
             ((7, 5), (8, 8), (9, 14), (16, 16), (3, 33)))
    for number, (height, width) in enumerate(sizes):
        compare(genotype(name), height, width, (4, 6)[number % 2], reduction, number % 2 == 1, number % 4 != 3,
                masked=number % 3 != 1, twice=number % 2 == 0)


@pytest.mark.parametrize('names, states, concat', [
    (('sep_conv_3x3', 'sep_conv_3x3', 'dil_conv_5x5', 'dil_conv_5x5'), (0, 0, 2, 2), (3, 2)),   # one state twice
    (('skip_connect', 'skip_connect', 'skip_connect', 'max_pool_3x3'), (0, 1, 0, 2), (2, 3)),   # one droppable edge
    (('skip_connect',), (0, 1), (2,))])                                            # no droppable edge, one node
def test_a_cell_of_another_form_equals_that_of_paddle(names, states, concat):
    for size in (1, 8):
        compare(genotype(*names, states=states, concat=concat), size, size)


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match='7 x 8 cannot be halved'):
        outcome(named()['DARTS_V2'], 7, 8, reduction=True)


@pytest.mark.skipif(paddle.__version__.startswith('2.'), reason="Paddle 2's convolution of the stem refuses it")
def test_an_empty_batch_gives_an_empty_result():
    network = NetworkCIFAR(named()['DARTS_V2'], 4, 10, 3, with_training=False)
    assert network.logits(np.zeros((0, 3, 32, 32), 'float32')).shape == (0, 10)


def test_an_unread_node_has_no_gradient():
    """Node 4 is neither read nor in the output; state 1 is read by such nodes only."""
    unread = genotype('sep_conv_3x3', 'max_pool_3x3', states=(0, 0, 0, 2, 1, 1, 2, 3), concat=(5,))
    compare(unread, 8, 8)
    result = outcome(unread, 8, 8)
    assert not np.any(result['s1']) and not np.any(result['cell._ops.4.op.1.weight']) and np.any(result['s0'])


@pytest.mark.parametrize('size', [32, 8, 7])
def test_a_cell_in_float32_agrees_within_its_precision_and_repeats_bit_identically(size):
    arguments, settings = (named()['DARTS_V2'], size, size), dict(channels=16, dtype='float32')
    exact, repeated = expected_outcome(*arguments, exact=True, **settings), outcome(*arguments, **settings)
    for name, array in outcome(*arguments, **settings).items():
        assert array.dtype == np.float32 and array.tobytes() == repeated[name].tobytes()
        assert np.abs(array - exact[name]).max() < 2e-5 * np.abs(exact[name]).max(), name


def supernet_gradients(dtype='float32'):
    """Returns loss and gradients by name of a supernet with the weights of seed 1, at the image size of a search."""
    batch = np.random.default_rng(1).normal(size=(3, 3, 32, 32)), np.arange(3)    # with this seed no ReLU changes sides
    initial = Supernet(channels=8, layers=3, seed=1, build_programs=False)
    supernet = Supernet(channels=8, layers=3, dtype=dtype)
    supernet.load_weights({**initial.weights(), **initial.alphas()})
    result = supernet.gradients(*batch)
    return {'loss': result.loss, **result.weights, **result.alphas}


@pytest.mark.slow
def test_the_supernet_in_float32_agrees_with_one_and_with_five_threads(tmp_path):
    """Five threads in a new process, which finds the compiled operators in the cache: compiling would be logged."""
    assert os.path.isfile(custom_ops.library_path())
    code = ("import sys, test_custom_ops as t; from engine import console; console.start_log(); "
            "print(t.custom_ops.enable(), t.custom_ops.threads()); t.np.savez(sys.argv[1], **t.supernet_gradients())")
    path = str(tmp_path / 'gradients.npz')
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, env=dict(
        os.environ, OMP_NUM_THREADS='5', PYTHONPATH=os.pathsep.join(sys.path)))
    assert (done.returncode, done.stdout) == (0, 'True 5\n'), done.stderr
    with custom_ops.disabled():
        exact = supernet_gradients('float64')
    gradients, with_five_threads = supernet_gradients(), np.load(path)
    assert set(gradients) == set(exact) == set(with_five_threads)
    assert gradients['loss'] == pytest.approx(exact['loss'], rel=1e-6)
    for name, gradient in exact.items():
        assert np.abs(gradients[name] - gradient).max() < 2e-5 * max(1e-2, np.abs(gradient).max()), name
        assert np.asarray(gradients[name]).tobytes() == with_five_threads[name].tobytes(), name


STEPS = """
import hashlib
import numpy as np
import engine
import genotypes
from architect import Architect
from engine import custom_ops
from engine.optimizers import MomentumSGD
from model import NetworkCIFAR
from model_search import Supernet

assert custom_ops.enable()
rng = np.random.default_rng(0)
batches = [(rng.normal(size=(9, 3, 32, 32)).astype('float32'), rng.integers(0, 10, (9, 1))) for _ in range(6)]
supernet = Supernet(4, layers=5, partial_channels={partial_channels})
optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
architect = Architect(supernet, optimizer)
for train, valid in zip(batches[:3], batches[3:]):
    architect.update(supernet.feed(*train), supernet.feed(*valid), 0.025)
    supernet.run(supernet.feed(*train))
    optimizer.step(0.025)
network = NetworkCIFAR(genotypes.DARTS_V2, 4, 10, 5, auxiliary=0.4, use_drop_path=True)
training = MomentumSGD(network.store, 0.9, 3e-4, 5.0)
for batch in batches:
    network.run(network.feed(*batch), 0.1, 0)
    training.step(0.025)
arrays = [supernet.store.get('theta'), supernet.store.get('alphas'), network.store.get('theta')]
print(custom_ops.threads(), *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays))
"""


@pytest.mark.slow
@pytest.mark.parametrize('partial_channels', [1, 2])
def test_steps_of_search_and_training_do_not_depend_on_the_number_of_threads(partial_channels):
    code = STEPS.format(partial_channels=partial_channels)
    lines = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(
        os.environ, OMP_NUM_THREADS=threads, PYTHONPATH=os.pathsep.join(sys.path))).stdout.split()
        for threads in ('1', '2', '4')]
    assert [line[0] for line in lines] == ['1', '2', '4'] and lines[0][1:] == lines[1][1:] == lines[2][1:]


@pytest.mark.parametrize('reduction', [False, True])
def test_of_equal_maxima_the_first_gets_the_gradient(reduction):
    """A cell of max pools only, on integers, where most windows have several maxima."""
    rng, channels, out = np.random.default_rng(0), 2, 8 if reduction else 16
    primitives, nodes = ('skip_connect', 'max_pool_3x3', 'avg_pool_3x3'), 4
    values = {'x': rng.geometric(0.3, (3, 2 * channels, 16, 16)).astype('float64'),
              'direction': rng.normal(size=(3, 4 * channels, out, out))}
    mixing = np.eye(3)[[1] * 14]

    def by_paddle(x):
        states = paddle.split(x, 2, axis=1)
        for _ in range(4):
            pooled = [max_pool(state, 2 if reduction and number < 2 else 1) for number, state in enumerate(states)]
            states.append(paddle.add_n([batch_norm(image) for image in pooled]))
        return paddle.concat(states[2:], axis=1)

    def by_compiled_operator(x):
        # Both convolutions of FactorizedReduce on the 8 edges of the inputs.
        weights = [paddle.full([8 * channels, channels, 1, 1], 0.1, x.dtype)] if reduction else []
        inputs = [paddle.assign(mixing).astype(x.dtype), *weights]    # Paddle 2.6 assigns float32
        for variable in inputs:
            variable.stop_gradient = False
        return custom_ops.mixed_cell(x, inputs[0], weights, primitives, nodes, reduction, 1, True, 0, BN_EPSILON)

    def results_of(function):
        store = VariableStore(paddle.CPUPlace(), 'float64')

        def build():
            x, direction = (store.input(name, list(array.shape)) for name, array in values.items())
            x.stop_gradient = False
            y = function(x)
            return [y, *paddle.static.gradients([paddle.sum(y * direction)], [x])]
        return StaticProgram(store, build)(**values)

    for result, expected in zip(results_of(by_compiled_operator), results_of(by_paddle)):
        assert np.abs(result - expected).max() < 1e-10 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------

def test_nan_is_propagated():
    """A NaN in one image reaches the output of this image and of no other, through ReLU and max pool."""
    result = outcome(genotype('sep_conv_3x3', 'dil_conv_3x3'), 8, 8, training=False, nan=True)['output']
    assert np.isnan(result[0, :, 3, 3]).all() and not np.isnan(result[1:]).any()
    pooled = outcome(genotype('max_pool_3x3', states=(0, 0), concat=(2,)), 8, 8, training=False, nan=True)['output']
    assert np.isnan(pooled[0, :, 2:5, 2:5]).all() and not np.isnan(pooled[1:]).any()


@pytest.mark.parametrize('flag', [False, True])
def test_the_flag_switches_them(flag):
    trainer.set_up(SimpleNamespace(custom_ops=flag, use_gpu=False), paddle.CPUPlace())
    enabled = custom_ops.enabled()
    custom_ops.enable()
    assert enabled == flag


def test_a_replaced_operation_is_not_computed_by_the_compiled_cells(monkeypatch):
    """The compiled operators know the name, but not the new function."""
    replaced = operations.Operation(partial(operations.SepConv, kernel=5))
    monkeypatch.setitem(operations.OPERATIONS, 'sep_conv_3x3', replaced)
    supernet = Supernet(2, 5, 3, image_size=8, space=SearchSpace(('skip_connect', 'sep_conv_3x3'), 2))
    assert not supernet.compiled and supernet.shapes['cells.0._ops.0._ops.1.op.1.weight'] == (2, 1, 5, 5)
    assert supernet.gradients(np.ones((2, 3, 8, 8)), np.arange(2)).loss > 0
    cells = NetworkCIFAR(genotype('sep_conv_3x3', 'max_pool_3x3'), 2, 5, 3, build_programs=False).cells
    assert not any(cell.compiled for cell in cells)


@pytest.mark.parametrize('compiler, reason', [(None, 'no C++ compiler'), ('exit 1', 'could not be compiled')])
def test_without_a_working_compiler_paddle_computes(tmp_path, monkeypatch, caplog, compiler, reason):
    """The log states the reason; the cache has no incomplete file."""
    for name in ('g++', 'gcc', 'c++', 'cc') if compiler else ():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "fatal error: broken"; {compiler}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}" if compiler else str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(custom_ops, '_state', {'enabled': False, 'loaded': False})
    assert not custom_ops.enable() and not custom_ops.enabled()
    assert len(caplog.messages) == 1 and reason in caplog.text
    assert not any(path.is_file() for path in (tmp_path / 'cache').rglob('*'))


@pytest.mark.skipif(utils.cores() < 2, reason="one core compiles one source after the other")
def test_sources_are_compiled_in_parallel(tmp_path, monkeypatch, capfd):
    """The compiler waits for a second one. Outside a terminal the compilation writes nothing."""
    events, compiler = tmp_path / 'events', tmp_path / 'compiler'
    events.touch()
    compiler.write_text(f"""#!/bin/sh
        case "$*" in *' -c '*) ;; *) exec g++ "$@";; esac
        echo start >> {events}
        tries=0
        while [ $(grep -c start {events}) -lt 2 ] && [ $tries -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
        echo end >> {events}
        while [ "$1" != -o ]; do shift; done
        echo 'int darts_threads;' | exec g++ -x c -c - -o "$2"
        """)
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    custom_ops.compile_to(str(tmp_path / 'cache' / 'darts_ops.so'))
    lines = events.read_text().split()
    assert lines[:2] == ['start'] * 2 and lines.count('end') == len(custom_ops.SOURCES)
    assert capfd.readouterr() == ('', '')
