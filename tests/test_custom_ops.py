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
from parameters import Function, Store
from runs import ROOT, run_well

NAMES = ('x', 'depthwise', 'pointwise', 'direction')


@pytest.fixture(scope='module', autouse=True)
def available(compiled):
    if not compiled:
        pytest.skip('the operators of this project could not be compiled')
    custom_ops.enable()
    yield
    custom_ops.enable(False)


def with_paddle(x, depthwise, pointwise, stride, dilation):
    """The same by Paddle's operators: the states copied for their edges, two convolutions."""
    channels, kernel = pointwise.shape[1], depthwise.shape[2]
    x = paddle.tile(F.relu(x), [1, depthwise.shape[0] // x.shape[1], 1, 1])
    x = F.conv2d(x, depthwise, None, stride, dilation * (kernel // 2), dilation, depthwise.shape[0])
    return F.conv2d(x, pointwise, None, groups=depthwise.shape[0] // channels)


def arrays(states, channels, copies, height, width, kernel, stride, count=3, dtype='float64', seed=0):
    rng = np.random.default_rng(seed)
    edges = states * copies * channels
    return dict(zip(NAMES, (rng.normal(size=shape).astype(dtype) for shape in (
        (count, states * channels, height, width), (edges, 1, kernel, kernel), (edges, channels, 1, 1),
        (count, edges, (height - 1) // stride + 1, (width - 1) // stride + 1)))))


def outcome(function, values, stride, dilation):
    """-> result and the gradients of x, depthwise and pointwise of sum(direction * result)."""
    store = Store(paddle.CPUPlace(), str(values['x'].dtype))

    def build():
        variables = [store.input(name, [None if name in ('x', 'direction') and k == 0 else size
                                        for k, size in enumerate(values[name].shape)]) for name in NAMES]
        for variable in variables[:3]:
            variable.stop_gradient = False
        result = function(*variables[:3], stride, dilation)
        return [result, *paddle.static.gradients([paddle.sum(result * variables[3])], variables[:3])]
    return Function(store, build)(**values)


@pytest.mark.parametrize('states, channels, copies', [(2, 4, 3), (1, 6, 2), (3, 2, 1), (1, 5, 1)])
@pytest.mark.parametrize('kernel, stride, dilation', [(3, 1, 1), (3, 2, 2), (5, 1, 2), (5, 2, 1), (7, 2, 1)])
def test_result_and_gradients_are_those_of_paddle(states, channels, copies, kernel, stride, dilation):
    # Widths for every width of vector, with and without columns behind the end; heights that are no multiple of a tile.
    for height, width in ((4, 4), (7, 5), (8, 8), (9, 14), (16, 16), (3, 33)):
        values = arrays(states, channels, copies, height, width, kernel, stride)
        for ours, expected in zip(outcome(custom_ops.separable_conv, values, stride, dilation),
                                  outcome(with_paddle, values, stride, dilation)):
            assert ours.shape == expected.shape
            assert np.abs(ours - expected).max() < 1e-12 * np.abs(expected).max(), (height, width)


@pytest.mark.parametrize('size', [32, 8, 7])
def test_single_precision_is_as_exact_as_it_can_be(size):
    values = arrays(2, 16, 2, size, size, 5, 1, dtype='float32')
    exact = outcome(with_paddle, {name: array.astype('float64') for name, array in values.items()}, 1, 1)
    for ours, expected in zip(outcome(custom_ops.separable_conv, values, 1, 1), exact):
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() < 2e-6 * np.abs(expected).max()


def test_a_call_repeats_itself_to_the_bit():
    values = arrays(2, 8, 2, 16, 16, 5, 1, count=7, dtype='float32')
    first, second = (outcome(custom_ops.separable_conv, values, 1, 2) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second))


def test_a_nan_is_not_rectified_away():
    values = arrays(1, 2, 1, 8, 8, 3, 1)
    values['x'][0, 0, 3, 3] = np.nan
    result = outcome(custom_ops.separable_conv, values, 1, 1)[0]
    assert np.isnan(result[0, :, 2:5, 2:5]).all() and not np.isnan(result[1:]).any()


IN_A_PROCESS = '''
import sys; sys.path[:0] = [{root!r}, {root!r} + '/tests', {root!r} + '/scripts']
import numpy as np, utils, custom_ops, trainer, test_custom_ops as t
trainer.start_log()
print('on', custom_ops.enable())
if custom_ops.enabled():
    values = t.arrays(2, 4, 2, 16, 16, 5, 1, count=7)
    for ours, expected in zip(t.outcome(custom_ops.separable_conv, values, 1, 1), t.outcome(t.with_paddle, values, 1, 1)):
        assert np.abs(ours - expected).max() < 1e-12 * np.abs(expected).max()
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
