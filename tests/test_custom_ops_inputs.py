"""The compiled operators refuse wrong inputs with a message that says what is wrong."""
import contextlib

import numpy as np
import paddle
import pytest

from engine import custom_ops
from engine.programs import StaticProgram, VariableStore


pytestmark = pytest.mark.usefixtures('compiled_operators')


@pytest.fixture
def refuses(capfd):
    """Returns a context that expects an error with a reason; Paddle 3 replaces the message of the exception."""
    @contextlib.contextmanager
    def refuses(reason):
        with pytest.raises(Exception):                # noqa: B017  its class depends on the version of Paddle
            yield
        assert reason in capfd.readouterr().err
    return refuses


# A mixed cell of 2 nodes (5 edges) with C = 4, one with every kind of primitive.
SPACE = dict(primitives=('skip_connect', 'sep_conv_3x3', 'dil_conv_5x5', 'none', 'max_pool_3x3'), nodes=2,
             reduction=True, partial_channels=1, weight_gradients=True, constant_states=0, epsilon=1e-5)
MIXED_INPUTS = {'x': (3, 8, 6, 6), 'mixing': (5, 5), 'depthwise_3': (40, 1, 3, 3), 'depthwise_5': (20, 1, 5, 5),
                'pointwise': (76, 4, 1, 1)}


def run_mixed_cell(shapes, attributes=(), dtypes=()):
    """Runs a mixed cell with random inputs of these shapes; returns its output and the gradient of x."""
    rng, settings = np.random.default_rng(0), {**SPACE, **dict(attributes)}
    store = VariableStore(paddle.CPUPlace())
    arrays = {name: rng.normal(size=shape).astype(dict(dtypes).get(name, 'float32')) for name, shape in shapes.items()}

    def build():
        variables = {name: store.input(name, list(array.shape), str(array.dtype)) for name, array in arrays.items()}
        for variable in variables.values():
            variable.stop_gradient = False
        x, mixing, *weights = variables.values()
        y = custom_ops.mixed_cell(x, mixing, weights, **settings)
        return [y, *paddle.static.gradients([paddle.sum(y * y)], [x])]
    return StaticProgram(store, build)(**arrays)


def test_a_mixed_cell_accepts_its_inputs():
    output, gradient = run_mixed_cell(MIXED_INPUTS)
    assert output.shape == (3, 8, 3, 3) and gradient.shape == (3, 8, 6, 6) and np.abs(gradient).max() > 0
    # The order of the weights makes no difference: their shapes identify them.
    first, weights = list(MIXED_INPUTS.items())[:2], list(MIXED_INPUTS.items())[2:]
    assert run_mixed_cell(dict(first + weights[::-1]))[0].shape == output.shape


def test_constant_states_of_a_mixed_cell_have_no_gradient():
    complete = run_mixed_cell(MIXED_INPUTS)[1].reshape(3, 2, 4, 6, 6)
    for constant in range(3):
        gradient = run_mixed_cell(MIXED_INPUTS, dict(weight_gradients=False, constant_states=constant))[1]
        gradient = gradient.reshape(complete.shape)
        assert not np.any(gradient[:, :constant])
        assert np.array_equal(gradient[:, constant:], complete[:, constant:])


@pytest.mark.parametrize('changes, reason', [
    (dict(x=(3, 8, 5, 6)), 'even H and W'), (dict(x=(3, 8, 6)), 'N, 2 C, H, W'), (dict(x=(3, 6, 6, 6)), 'even C'),
    (dict(x=(3, 0, 6, 6)), 'even C'), (dict(x=(3, 16, 6, 6)), 'lacks weights'), (dict(mixing=(14, 8)), 'mixing w'),
    (dict(mixing=(25,)), 'mixing weights'), (dict(depthwise_3=(39, 1, 3, 3)), 'lacks weights'),
    (dict(depthwise_3=(44, 1, 3, 3)), 'more weights'), (dict(depthwise_5=(20, 1, 5, 3)), 'lacks weights'),
    (dict(depthwise_5=(20, 5, 5)), 'lacks weights'), (dict(pointwise=(72, 4, 1, 1)), 'lacks weights'),
    (dict(pointwise=(76, 2, 2, 1)), 'lacks weights'), (dict(extra=(4, 4, 4)), 'more weights')])
def test_wrong_shapes_of_a_mixed_cell_are_errors(refuses, changes, reason):
    with refuses(reason):
        run_mixed_cell({**MIXED_INPUTS, **changes})


@pytest.mark.parametrize('changes, reason', [
    (dict(primitives=('skip_connect', 'conv_7x1_1x7')), 'no operation conv_7x1_1x7'),
    (dict(primitives=('none', 'none')), 'none occurs more than once'), (dict(primitives=()), 'primitives'),
    (dict(nodes=0), 'nodes'), (dict(nodes=-3), 'nodes'), (dict(nodes=3), 'mixing weights'),
    (dict(constant_states=1), 'constant_states'), (dict(weight_gradients=False, constant_states=3), 'constant_states'),
    (dict(epsilon=0.0), 'epsilon'), (dict(partial_channels=0), 'partial_channels'),
    (dict(partial_channels=2), 'mixing weights'), (dict(partial_channels=4), 'does not divide')])
def test_wrong_attributes_of_a_mixed_cell_are_errors(refuses, changes, reason):
    with refuses(reason):
        run_mixed_cell(MIXED_INPUTS, changes)


@pytest.mark.parametrize('name', list(MIXED_INPUTS)[1:])
def test_different_element_types_in_a_mixed_cell_are_errors(refuses, name):
    with refuses('element types'):
        run_mixed_cell(MIXED_INPUTS, dtypes={name: 'float64'})


# A discrete cell of one node with C = 4: sep_conv_3x3 and none.
CELL = dict(operations=['sep_conv_3x3', 'none'], states=[0, 1], concat=[2], channels=4, reduction=False,
            reduction_prev=False, training=True, twice=False, epsilon=1e-5, momentum=0.9)
CELL_INPUTS = {'x0': (3, 6, 8, 8), 'x1': (3, 5, 8, 8), 'running': (32,), 'masks': (3, 2, 1, 1), 'first': (4, 6, 1, 1),
               'second': (4, 5, 1, 1), 'depthwise': (8, 1, 3, 3), 'pointwise': (8, 4, 1, 1), 'affine': (32,)}


def run_discrete_cell(shapes, attributes=(), dtypes=()):
    store = VariableStore(paddle.CPUPlace())
    arrays = {name: np.random.default_rng(0).random(shape).astype(dict(dtypes).get(name, 'float32'))
              for name, shape in shapes.items()}

    def build():
        variables = {name: store.input(name, list(array.shape), str(array.dtype)) for name, array in arrays.items()}
        for name in set(variables) - {'running', 'masks'}:
            variables[name].stop_gradient = False
        x0, x1, running, masks, *weights = variables.values()
        y = custom_ops.discrete_cell(x0, x1, running, masks, weights, **{**CELL, **dict(attributes)})[0]
        return [y, *paddle.static.gradients([paddle.sum(y * y)], [x0])]
    return StaticProgram(store, build)(**arrays)


def test_a_discrete_cell_accepts_its_inputs():
    assert [array.shape for array in run_discrete_cell(CELL_INPUTS)] == [(3, 4, 8, 8), (3, 6, 8, 8)]


@pytest.mark.parametrize('changes, reason', [
    (dict(x0=(2, 6, 8, 8)), 'differ in batch size'), (dict(x0=(3, 6, 16, 16)), 'differ in batch size'),
    (dict(x0=(3, 6, 64)), 'differ in batch size'), (dict(running=(24,)), 'running statistics'),
    (dict(running=(40,)), 'running statistics'),
    (dict(masks=(3, 1, 1, 1)), 'masks'), (dict(masks=(2, 2, 1, 1)), 'masks'),
    (dict(first=(4, 7, 1, 1)), 'lacks weights'), (dict(depthwise=(12, 1, 3, 3)), 'more weights'),
    (dict(affine=(31,)), 'lacks weights'), (dict(pointwise=(8, 4, 2, 1)), 'lacks weights')])
def test_wrong_shapes_of_a_discrete_cell_are_errors(refuses, changes, reason):
    with refuses(reason):
        run_discrete_cell({**CELL_INPUTS, **changes})


@pytest.mark.parametrize('changes, reason', [
    (dict(operations=['sep_conv_3x3', 'conv_9x9']), 'no operation conv_9x9'),
    (dict(operations=['none']), 'two operations'),
    (dict(states=[0, 2]), 'does not precede'), (dict(states=[-1, 0]), 'does not precede'), (dict(states=[0]), 'states'),
    (dict(concat=[3]), 'different nodes'), (dict(concat=[2, 2]), 'different nodes'), (dict(concat=[]), 'an output'),
    (dict(channels=0), 'channels'), (dict(channels=8), 'lacks weights'), (dict(epsilon=-1.0), 'epsilon'),
    (dict(momentum=2.0), 'momentum')])
def test_wrong_attributes_of_a_discrete_cell_are_errors(refuses, changes, reason):
    with refuses(reason):
        run_discrete_cell(CELL_INPUTS, changes)


@pytest.mark.parametrize('name', ['x1', 'running', 'masks', 'pointwise'])
def test_different_element_types_in_a_discrete_cell_are_errors(refuses, name):
    with refuses('element types'):
        run_discrete_cell(CELL_INPUTS, dtypes={name: 'float64'})


# Preprocessing to C = 4 channels: the first state is twice as large.
STATES = {'s0': (3, 6, 8, 12), 's1': (3, 5, 4, 6), 'first': (2, 6, 1, 1), 'second': (2, 6, 1, 1),
          'kernel': (4, 5, 1, 1)}


def run_preprocessing(shapes, dtypes=(), epsilon=1e-5, weight_gradients=True, constant_states=0):
    """Runs the preprocessing of a cell with random inputs of these shapes; returns its output and the gradients of both
    states.
    """
    rng, store = np.random.default_rng(0), VariableStore(paddle.CPUPlace())
    arrays = {name: rng.normal(size=shape).astype(dict(dtypes).get(name, 'float32')) for name, shape in shapes.items()}

    def build():
        variables = [store.input(name, list(array.shape), str(array.dtype)) for name, array in arrays.items()]
        for variable in variables:
            variable.stop_gradient = False
        s0, s1, *kernels = variables
        x = custom_ops.preprocessing(s0, s1, kernels, weight_gradients, constant_states, epsilon)
        return [x, *paddle.static.gradients([paddle.sum(x * x * x)], [s0, s1])]
    return StaticProgram(store, build)(**arrays)


def test_preprocessing_accepts_its_inputs():
    output = run_preprocessing(STATES)[0]
    assert output.shape == (3, 8, 4, 6) and np.abs(output.mean(axis=(0, 2, 3))).max() < 1e-6
    assert np.abs(output.std(axis=(0, 2, 3)) - 1).max() < 1e-3


def test_constant_states_of_preprocessing_have_no_gradient(refuses):
    complete = run_preprocessing(STATES)[1:]
    for constant in range(3):
        gradients = run_preprocessing(STATES, weight_gradients=False, constant_states=constant)[1:]
        for number, (gradient, expected) in enumerate(zip(gradients, complete)):
            assert np.any(expected)
            assert np.array_equal(gradient, expected if number >= constant else np.zeros_like(expected))
    with refuses('constant_states'):
        run_preprocessing(STATES, constant_states=1)


@pytest.mark.parametrize('changes, reason', [
    (dict(s0=(3, 6, 8, 10)), 'states'), (dict(s0=(2, 6, 8, 12)), 'states'), (dict(s0=(3, 6, 8)), 'states'),
    (dict(s0=(3, 7, 8, 12)), 'kernel'), (dict(s1=(3, 6, 4, 6)), 'kernel'), (dict(second=(1, 6, 1, 1)), 'kernel'),
    (dict(kernel=(4, 5, 3, 3)), 'kernel'), (dict(kernel=(3, 5, 1, 1)), 'even'),
    (dict(more=(4, 5, 1, 1)), 'kernels')])
def test_wrong_shapes_of_preprocessing_are_errors(refuses, changes, reason):
    with refuses(reason):
        run_preprocessing({**STATES, **changes})


def test_wrong_epsilons_and_element_types_of_preprocessing_are_errors(refuses):
    with refuses('epsilon'):
        run_preprocessing(STATES, epsilon=0.0)
    with refuses('element types'):
        run_preprocessing(STATES, dtypes={'second': 'float64'})
