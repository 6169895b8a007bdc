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

import custom_ops
import make_sample
import reader
from genotypes import PRIMITIVES
from model_search import Supernet
from operations import BN_EPSILON, batch_norm, max_pool
from parameters import Function, Store
from runs import ROOT, run_well

WEIGHTS = ('x', 'depthwise', 'pointwise', 'affine')
NAMES = (*WEIGHTS, 'running', 'mask', 'direction')


@pytest.fixture(scope='module', autouse=True)
def available(compiled):
    if not compiled:
        pytest.skip('the operators of this project could not be compiled')
    custom_ops.enable()
    yield
    custom_ops.enable(False)


def with_paddle(x, depthwise, pointwise, affine, running, mask, stages, stride, dilation, training):
    """conv_norm by Paddle's operators."""
    kernel, channels = depthwise.shape[2], affine.shape[0] // (2 * stages)
    moved = []
    for stage in range(stages):
        x = F.relu(x)
        if kernel > 1:
            x = F.conv2d(x, depthwise[stage * channels:(stage + 1) * channels], None, 1 if stage else stride,
                         dilation * (kernel // 2), dilation, channels)
        x = F.conv2d(x, pointwise[stage * channels:(stage + 1) * channels])
        scale, shift = paddle.split(affine[2 * stage * channels:2 * (stage + 1) * channels], 2)
        mean, variance = paddle.split(running[2 * stage * channels:2 * (stage + 1) * channels], 2)
        x = F.batch_norm(x, mean, variance, scale, shift, training, momentum=0.9, epsilon=1e-5)
        moved += [mean, variance]                                # written over while training
    return x if mask is None else x * mask, paddle.concat(moved)


def with_one_operator(*arguments):
    return custom_ops.conv_norm(*arguments, epsilon=1e-5, momentum=0.9)


def arrays(channels, height, width, kernel, stride, stages, c_in=None, count=3, dtype='float64', seed=0):
    rng = np.random.default_rng(seed)
    c_in = c_in or channels
    values = dict(zip(NAMES, (rng.normal(size=shape) for shape in (
        (count, c_in, height, width), (stages * channels if kernel > 1 else 1, 1, kernel, kernel),
        (stages * channels, c_in, 1, 1), (stages * 2 * channels,), (stages * 2 * channels,), (count, 1, 1, 1),
        (count, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)))))
    values['running'] = np.abs(values['running'])                # variances are positive
    return {name: array.astype(dtype) for name, array in values.items()}


def outcome(function, values, stages, stride, dilation, training=True, masked=True):
    """-> result, moved running statistics, and the gradients of WEIGHTS of sum(direction * result)."""
    store = Store(paddle.CPUPlace(), str(values['x'].dtype))

    def build():
        variables = {name: store.input(name, list(values[name].shape)) for name in NAMES}
        for name in WEIGHTS:
            variables[name].stop_gradient = False
        # Paddle writes over what it is given.
        arguments = dict(variables, running=paddle.assign(variables['running']), mask=variables['mask'] if masked else None)
        direction = arguments.pop('direction')
        result, moved = function(*arguments.values(), stages, stride, dilation, training)
        wanted = [variables[name] for name in WEIGHTS if name != 'depthwise' or values[name].shape[2] > 1]
        return [result, moved, *paddle.static.gradients([paddle.sum(result * direction)], wanted)]
    return Function(store, build)(**values)


def compare(values, tolerance, *settings):
    for ours, expected in zip(outcome(with_one_operator, values, *settings), outcome(with_paddle, values, *settings)):
        assert ours.shape == expected.shape
        assert np.abs(ours - expected).max() < tolerance * max(1.0, np.abs(expected).max()), (values['x'].shape, settings)


@pytest.mark.parametrize('kernel, stride, dilation, stages', [
    (1, 1, 1, 1), (3, 1, 1, 2), (3, 2, 1, 2), (3, 2, 2, 1), (5, 1, 2, 1), (5, 2, 1, 2), (7, 1, 1, 2), (7, 2, 1, 1)])
def test_result_and_gradients_are_those_of_paddle(kernel, stride, dilation, stages):
    # Widths for every width of vector, with and without columns behind the end; heights that are no multiple of a tile.
    for number, (height, width) in enumerate(((4, 4), (7, 5), (8, 8), (9, 14), (16, 16), (3, 33))):
        channels = (4, 6, 5)[number % 3]
        values = arrays(channels, height, width, kernel, stride, stages, c_in=7 if kernel == 1 else channels)
        compare(values, 1e-11, stages, stride, dilation, number % 4 != 3, number % 2 == 0)


@pytest.mark.parametrize('size', [32, 8, 7])
def test_single_precision_is_as_exact_as_it_can_be(size):
    values = arrays(16, size, size, 5, 1, 2, dtype='float32')
    exact = outcome(with_paddle, {name: array.astype('float64') for name, array in values.items()}, 2, 1, 1)
    for ours, expected in zip(outcome(with_one_operator, values, 2, 1, 1), exact):
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() < 5e-6 * np.abs(expected).max()


def test_the_cell_of_the_supernet_in_single_precision():
    """At the size of the search, where float64 with the widest vectors is not what is used."""
    batch = np.random.default_rng(1).normal(size=(3, 3, 32, 32)), np.arange(3)   # no ReLU on the edge, which would flip
    ours = Supernet(channels=8, layers=3, seed=1)
    found = ours.gradients(*batch)
    with custom_ops.without():
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
        store = Store(paddle.CPUPlace(), 'float64')

        def build():
            x, direction = (store.input(name, list(array.shape)) for name, array in values.items())
            x.stop_gradient = False
            result = function(x)
            return [result, *paddle.static.gradients([paddle.sum(result * direction)], [x])]
        results.append(Function(store, build)(**values))
    for ours, expected in zip(*results):
        assert np.abs(ours - expected).max() < 1e-10 * np.abs(expected).max()


def test_a_call_repeats_itself_to_the_bit():
    values = arrays(8, 16, 16, 5, 1, 2, count=7, dtype='float32')
    first, second = (outcome(with_one_operator, values, 2, 1, 1) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second))


def test_a_nan_is_not_rectified_away():
    values = arrays(2, 8, 8, 3, 1, 1)
    values['x'][0, 0, 3, 3] = np.nan
    result = outcome(with_one_operator, values, 1, 1, 1, False)[0]
    assert np.isnan(result[0, :, 2:5, 2:5]).all() and not np.isnan(result[1:]).any()


IN_A_PROCESS = '''
import sys; sys.path[:0] = [{root!r}, {root!r} + '/tests', {root!r} + '/scripts']
import numpy as np, utils, custom_ops, trainer, test_custom_ops as t
trainer.start_log()
print('on', custom_ops.enable())
if custom_ops.enabled():
    t.compare(t.arrays(4, 16, 16, 5, 1, 2, count=7), 1e-11, 2, 1, 1)
    t.test_the_cell_of_the_supernet_in_single_precision()
'''


def in_a_process(**environment):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', IN_A_PROCESS.format(root=ROOT)], capture_output=True,
                          text=True, env=dict(os.environ, **environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_several_threads_give_the_same():
    assert in_a_process(OMP_NUM_THREADS='3')[-1] == 'on True'


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
                          '--init_channels', '2', '--layers', '3', '--batch_size', '40', '--use_gpu', 'False', '--epochs', '1', '--unrolled', 'False',
                          '--report_freq', '1', '--custom_ops', wanted, '--model_save_dir', tmp_path / wanted)
        losses.append([float(loss) for loss in re.findall(r'epoch 1 step \d/\d: loss ([\d.]+)', output)])
    assert len(losses[0]) == 1 and losses[0] == pytest.approx(losses[1], abs=2e-4)
