"""The operators of custom_ops against Paddle's, and what happens where they cannot be compiled.

test_model_search.py, test_architect.py and test_model.py run with them and without, against plain networks.
"""
import os
import re
import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from engine import custom_ops
import make_sample
import operations
import reader
from genotypes import GENOTYPES, PRIMITIVES, Genotype
from model import Cell, NetworkCIFAR
from model_search import Supernet
from operations import BN_EPSILON, batch_norm, max_pool
from engine.parameters import FlatParameters
from engine.programs import StaticProgram, VariableStore
from runs import ROOT, run_well


@pytest.fixture(scope='module', autouse=True)
def available(compiled):
    if not compiled:
        pytest.skip('the operators of this project could not be compiled')
    custom_ops.enable()
    yield
    custom_ops.enable(False)


# Of a cell of one operation: states that several edges read, inputs and nodes; 3 and 5 alone are in the output.
STATES, CONCAT = (0, 1, 0, 2, 1, 3, 2, 4), (3, 5)


def genotype(*names, states=STATES, concat=CONCAT):
    """Both cells alike, of these operations in turn."""
    edges = tuple((names[n % len(names)], state) for n, state in enumerate(states))
    return Genotype(edges, concat, edges, concat)


def outcome(genotype, height, width, channels=4, reduction=False, reduction_prev=False, training=True, masked=True,
            dtype='float64', exact=False, nan=False):
    """A cell of a discrete network, as custom_ops is switched on or off.

    exact: the same random inputs, but computed in float64; nan: one number of the inputs is none.
    -> {what: array}: its output, the gradients of sum(direction * output), the moved running statistics.
    """
    rng = np.random.default_rng(0)
    layout = FlatParameters(running_statistics=True)
    cell = Cell(layout, genotype, 'cell', 7, 5, channels, reduction, reduction_prev)
    layout.assign_offsets()
    layout.statistics.assign_offsets()
    scale, out = (2 if reduction_prev else 1), (2 if reduction else 1)
    values = {'s0': rng.normal(size=(3, 7, height * scale, width * scale)), 's1': rng.normal(size=(3, 5, height, width)),
              'masks': rng.normal(size=(3, max(1, sum(cell.droppable)), 1, 1)),
              'direction': rng.normal(size=(3, cell.channels_out, height // out, width // out))}
    vectors = {'theta': rng.normal(size=layout.size), 'statistics': np.abs(rng.normal(size=layout.statistics.size))}
    if nan:
        values['s0'][0, 0, 3, 3] = np.nan
    values, vectors = ({name: array.astype(dtype) for name, array in each.items()} for each in (values, vectors))
    store = VariableStore(paddle.CPUPlace(), 'float64' if exact else dtype)
    for name, array in vectors.items():
        store.set(name, array)

    def build():
        variables = {name: store.input(name, list(array.shape)) for name, array in values.items()}
        theta = store.variable('theta', trainable=True)
        layout.training = training
        layout.unpack(theta, custom_ops.enabled())
        layout.statistics.unpack(store.variable('statistics'), custom_ops.enabled())
        inputs = [variables['s0'], variables['s1']]
        for each in inputs:
            each.stop_gradient = False
        result = cell(*inputs, variables['masks'] if masked and any(cell.droppable) else None)
        gradients = paddle.static.gradients([paddle.sum(result * variables['direction'])], [theta, *inputs])
        store.assign('statistics', layout.statistics.pack())
        # None: no path leads there.
        return [result, *(paddle.zeros_like(x) if gradient is None else gradient
                          for gradient, x in zip(gradients, [theta, *inputs]))]
    result, gradient, *input_gradients = StaticProgram(store, build)(
        **{name: array.astype(store.dtype) for name, array in values.items()})
    return {'output': result, 's0': input_gradients[0], 's1': input_gradients[1], **layout.named(gradient),
            **layout.statistics.named(store.get('statistics'))}


def expected_outcome(*arguments, **settings):
    """`outcome` by Paddle's operators, with an average pool whose gradient is exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, 'avg_pool', exact_average_pool)
        with custom_ops.disabled():
            return outcome(*arguments, **settings)


def exact_average_pool(x, stride):
    kernel = paddle.ones([x.shape[1], 1, 3, 3], x.dtype)
    total, count = (F.conv2d(each, kernel, None, stride, 1, 1, x.shape[1]) for each in (x, paddle.ones_like(x)))
    return total / count


def compare(*arguments, **settings):
    ours, expected = outcome(*arguments, **settings), expected_outcome(*arguments, **settings)
    assert set(ours) == set(expected)
    for name, array in expected.items():
        assert ours[name].shape == array.shape
        assert np.abs(ours[name] - array).max() < 1e-11 * max(1.0, np.abs(array).max()), (name, arguments[1:], settings)


@pytest.mark.parametrize('reduction', [False, True])
@pytest.mark.parametrize('name', sorted(custom_ops.OPERATIONS))
def test_a_cell_of_one_operation_is_that_of_paddle(name, reduction):
    # Widths for every width of vector, with and without columns behind the end; heights that are no multiple of a tile.
    sizes = ((4, 4), (8, 6), (8, 8), (6, 14), (32, 32), (4, 34)) if reduction else ((7, 5), (8, 8), (9, 14), (16, 16), (3, 33))
    for number, (height, width) in enumerate(sizes):
        compare(genotype(name), height, width, (4, 6)[number % 2], reduction, number % 2 == 1, number % 4 != 3,
                masked=number % 3 != 1)


@pytest.mark.parametrize('arch', ['NASNet', 'DARTS_V1', 'DARTS_V2', 'DARTS_PADDLE'])
@pytest.mark.parametrize('reduction', [False, True])
def test_cells_of_published_genotypes_are_those_of_paddle(arch, reduction):
    compare(GENOTYPES[arch], 8, 8, 6, reduction, not reduction)


@pytest.mark.parametrize('names, states, concat', [
    (('sep_conv_3x3', 'sep_conv_3x3', 'dil_conv_5x5', 'dil_conv_5x5'), (0, 0, 2, 2), (3, 2)),      # a state twice in a node
    (('skip_connect', 'skip_connect', 'skip_connect', 'max_pool_3x3'), (0, 1, 0, 2), (2, 3)),      # one edge to be dropped
    (('skip_connect',), (0, 1), (2,))])                                                            # none, and one node
def test_a_cell_of_another_form_is_that_of_paddle(names, states, concat):
    for size in (1, 8):
        compare(genotype(*names, states=states, concat=concat), size, size)


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match='7 x 8 cannot be halved'):
        outcome(GENOTYPES['DARTS_V2'], 7, 8, reduction=True)


@pytest.mark.skipif(paddle.__version__.startswith('2.'), reason="the stem is Paddle's, whose convolution refuses it there")
def test_an_empty_batch_gives_an_empty_result():
    network = NetworkCIFAR(GENOTYPES['DARTS_V2'], 4, 10, 3)
    assert network.logits(np.zeros((0, 3, 32, 32), 'float32')).shape == (0, 10)


def test_a_node_that_nothing_reads_has_no_gradient():
    """Node 4 is neither read nor in the output; nor is state 1 read by anything that is."""
    unread = genotype('sep_conv_3x3', 'max_pool_3x3', states=(0, 0, 0, 2, 1, 1, 2, 3), concat=(5,))
    compare(unread, 8, 8)
    found = outcome(unread, 8, 8)
    assert not np.any(found['s1']) and not np.any(found['cell._ops.4.op.1.weight']) and np.any(found['s0'])


@pytest.mark.parametrize('size', [32, 8, 7])
def test_a_cell_in_single_precision_is_as_exact_as_it_can_be(size):
    settings = dict(channels=16, dtype='float32')
    exact = expected_outcome(GENOTYPES['DARTS_V2'], size, size, exact=True, **settings)
    for name, ours in outcome(GENOTYPES['DARTS_V2'], size, size, **settings).items():
        assert ours.dtype == np.float32
        assert np.abs(ours - exact[name]).max() < 2e-5 * np.abs(exact[name]).max(), name


def test_the_cell_of_the_supernet_in_single_precision():
    """At the size of the search, where float64 with the widest vectors is not what is used."""
    batch = np.random.default_rng(1).normal(size=(3, 3, 32, 32)), np.arange(3)   # no ReLU on the edge, which would flip
    ours = Supernet(channels=8, layers=3, seed=1)
    found = ours.gradients(*batch)
    with custom_ops.disabled():
        exact = Supernet(channels=8, layers=3, seed=1, dtype='float64')
        exact.set_weights(ours.weights())
        exact.set_alphas(ours.alphas())
        expected = exact.gradients(*batch)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, gradient in {**expected.weights, **expected.alphas}.items():
        difference = np.abs({**found.weights, **found.alphas}[name] - gradient).max()
        assert difference < 2e-5 * max(1e-2, np.abs(gradient).max()), name


@pytest.mark.parametrize('reduction', [False, True])
def test_of_equal_maxima_the_first_gets_the_gradient(reduction):
    """A cell of max pools alone, on whole numbers, where most windows have several maxima."""
    rng, channels, size = np.random.default_rng(0), 2, 16
    out = size // 2 if reduction else size
    values = {'x': rng.geometric(0.3, (3, 2 * channels, size, size)).astype('float64'),
              'direction': rng.normal(size=(3, 4 * channels, out, out))}
    mixing = np.eye(8)[[PRIMITIVES.index('max_pool_3x3')] * 14]

    def by_paddle(x):
        states = paddle.split(x, 2, axis=1)
        for node in range(4):
            pooled = [max_pool(state, 2 if reduction and number < 2 else 1) for number, state in enumerate(states)]
            states.append(paddle.add_n([batch_norm(each) for each in pooled]))
        return paddle.concat(states[2:], axis=1)

    def by_one_operator(x):
        edges = 14 * channels
        weights = [paddle.full(shape, 0.1, x.dtype) for shape in (
            [3 * edges, 1, 3, 3], [3 * edges, 1, 5, 5], [6 * edges + 8 * channels * reduction, channels, 1, 1])]
        for weight in weights:
            weight.stop_gradient = False
        table = paddle.assign(mixing).astype(x.dtype)          # 2.6 makes it float32
        table.stop_gradient = False
        return custom_ops.mixed_cell(x, *weights, table, reduction, True, BN_EPSILON)

    results = []
    for function in (by_one_operator, by_paddle):
        store = VariableStore(paddle.CPUPlace(), 'float64')

        def build():
            x, direction = (store.input(name, list(array.shape)) for name, array in values.items())
            x.stop_gradient = False
            result = function(x)
            return [result, *paddle.static.gradients([paddle.sum(result * direction)], [x])]
        results.append(StaticProgram(store, build)(**values))
    for ours, expected in zip(*results):
        assert np.abs(ours - expected).max() < 1e-10 * np.abs(expected).max()


def test_a_call_repeats_itself_to_the_bit():
    first, second = (outcome(GENOTYPES['DARTS_PADDLE'], 16, 16, 8, dtype='float32') for _ in range(2))
    assert all(np.array_equal(array, second[name]) for name, array in first.items())


def test_a_nan_is_not_rectified_away():
    """One in an image stays in that image, and gets to the output."""
    result = outcome(genotype('sep_conv_3x3', 'dil_conv_3x3'), 8, 8, training=False, nan=True)['output']
    assert np.isnan(result[0, :, 3, 3]).all() and not np.isnan(result[1:]).any()
    pooled = outcome(genotype('max_pool_3x3', states=(0, 0), concat=(2,)), 8, 8, training=False, nan=True)['output']
    assert np.isnan(pooled[0, :, 2:5, 2:5]).all() and not np.isnan(pooled[1:]).any()


IN_A_PROCESS = '''
import sys; sys.path[:0] = [{root!r}, {root!r} + '/tests', {root!r} + '/scripts/dev']
from engine import console, custom_ops
import test_custom_ops as t
console.start_log()
print('on', custom_ops.enable())
if custom_ops.enabled():
    t.compare(t.GENOTYPES['DARTS_V2'], 16, 16)
    t.test_the_cell_of_the_supernet_in_single_precision()
'''


def in_a_process(**environment):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', IN_A_PROCESS.format(root=ROOT)], capture_output=True,
                          text=True, env=dict(os.environ, **environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_several_threads_give_the_same():
    assert in_a_process(OMP_NUM_THREADS='5')[-1] == 'on True'


def test_without_a_compiler_paddle_computes(tmp_path):
    lines = in_a_process(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert lines[-1] == 'on False' and any('no C++ compiler' in line for line in lines)


def test_a_compiler_that_fails_is_said_and_leaves_nothing(tmp_path):
    (tmp_path / 'bin').mkdir()
    for name in ('g++', 'gcc', 'c++', 'cc'):
        (tmp_path / 'bin' / name).write_text('#!/bin/sh\necho "fatal error: it is broken"; exit 1\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    lines = in_a_process(XDG_CACHE_HOME=str(tmp_path / 'cache'), PATH=path)
    assert lines[-1] == 'on False' and any('could not be compiled' in line for line in lines)
    assert not [name for _, _, names in os.walk(tmp_path / 'cache') for name in names]


def test_it_is_compiled_once():
    assert os.path.isfile(custom_ops.library_path())
    assert in_a_process() == ['on True']                       # and nothing is said of compiling


def test_a_search_is_the_same_with_them_and_without(tmp_path):
    """To rounding: the loss of the first step."""
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(tmp_path / 'data'), train=8, test=1)
    losses = []
    for wanted in ('True', 'False'):
        output = run_well('train_search.py', '--dataset', 'fashion_mnist_sample', '--data', tmp_path / 'data',
                          '--init_channels', '2', '--layers', '3', '--batch_size', '40', '--use_gpu', 'False', '--epochs', '1',
                          '--unrolled', 'False', '--report_freq', '1', '--custom_ops', wanted,
                          '--model_save_dir', tmp_path / wanted)
        losses.append([float(loss) for loss in re.findall(r'epoch 1 step \d/\d: loss ([\d.]+)', output)])
    assert len(losses[0]) == 1 and losses[0] == pytest.approx(losses[1], abs=2e-4)
