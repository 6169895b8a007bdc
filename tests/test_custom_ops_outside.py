"""The compiled operators outside of the cells, the stem and the step of the weights, against Paddle's and numpy."""
import numpy as np
import paddle
import pytest

from engine import custom_ops
from engine.optimizers import MomentumSGD
from engine.parameters import FlatParameters
from engine.programs import StaticProgram, VariableStore
from operations import Stem
from test_custom_ops_inputs import refuses  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures('compiled_operators')


def outcome(compiled, height, width, running=True, training=True, weight_gradients=True, dtype='float64', images=3):
    """Returns {name: array} of a stem: output, gradients of sum(direction * output), updated running statistics."""
    rng = np.random.default_rng(0)
    layout = FlatParameters(running_statistics=running)
    stem = Stem(layout, 5)
    layout.assign_offsets()
    values = {'images': rng.normal(size=(images, 3, height, width)) + 1,
              'direction': rng.normal(size=(images, 5, height, width))}
    store = VariableStore(paddle.CPUPlace(), dtype)
    store.set('theta', rng.normal(size=layout.size))
    if running:
        layout.statistics.assign_offsets()
        store.set('statistics', np.abs(rng.normal(size=layout.statistics.size)))

    def build():
        variables = {name: store.input(name, list(array.shape)) for name, array in values.items()}
        theta = store.variable('theta', trainable=True)
        layout.training = training
        layout.unpack(theta)
        if running:
            layout.statistics.unpack(store.variable('statistics'))
        result = stem(variables['images'], compiled, weight_gradients)
        gradient, = paddle.static.gradients([paddle.sum(result * variables['direction'])], [theta])
        if running:
            store.assign('statistics', layout.statistics.pack())
        return [result, gradient]
    result, gradient = StaticProgram(store, build)(**{name: array.astype(dtype) for name, array in values.items()})
    statistics = layout.statistics.named(store.get('statistics')) if running else {}
    return {'output': result, **layout.named(gradient), **statistics}


@pytest.mark.parametrize('running, training', [(True, True), (True, False), (False, True)])
def test_the_stem_equals_that_of_paddle(running, training):
    for height, width in ((32, 32), (5, 7), (1, 1), (2, 1), (1, 9), (4, 16)):
        result, expected = (outcome(compiled, height, width, running, training) for compiled in (True, False))
        assert set(result) == set(expected) and len(result) == (6 if running else 4)
        for name, array in expected.items():
            assert result[name].shape == array.shape
            assert np.abs(result[name] - array).max() < 1e-11 * max(1.0, np.abs(array).max()), (name, height, width)


def test_the_stem_in_float32_agrees_within_its_precision():
    result, expected = (outcome(compiled, 32, 32, dtype=dtype)
                        for compiled, dtype in ((True, 'float32'), (False, 'float64')))
    for name, array in expected.items():
        assert result[name].dtype == np.float32
        assert np.abs(result[name] - array).max() < 2e-5 * np.abs(array).max(), name


def test_a_stem_without_gradients_of_the_weights_has_the_same_output():
    without, complete = outcome(True, 8, 8, weight_gradients=False), outcome(True, 8, 8)
    assert without['output'].tobytes() == complete['output'].tobytes()
    for name in ('stem.0.weight', 'stem.1.weight', 'stem.1.bias'):
        assert not np.any(without[name]) and np.any(complete[name])


STEM = {'images': (2, 3, 8, 8), 'weight': (6, 3, 3, 3), 'scale': (6,), 'shift': (6,), 'mean': (6,), 'variance': (6,)}


def run_stem(shapes=STEM, dtypes=(), epsilon=1e-5):
    store = VariableStore(paddle.CPUPlace())
    arrays = {name: np.ones(shape, dict(dtypes).get(name, 'float32')) for name, shape in shapes.items()}

    def build():
        variables = [store.input(name, list(array.shape), str(array.dtype)) for name, array in arrays.items()]
        return [custom_ops.stem(*variables, True, True, epsilon, 0.9)[0]]
    return StaticProgram(store, build)(**arrays)[0]


@pytest.mark.parametrize('changes, reason', [
    (dict(images=(2, 3, 8)), 'images'), (dict(images=(2, 4, 8, 8)), 'weight of the stem'),
    (dict(images=(2, 3, 0, 8)), 'images'), (dict(weight=(6, 3, 3)), 'images'),
    (dict(weight=(6, 3, 5, 5)), 'weight of the stem'), (dict(scale=(5,)), 'scale'), (dict(shift=(7,)), 'vector'),
    (dict(mean=(6, 1)), 'vector'), (dict(variance=(5,)), 'vector')])
def test_wrong_shapes_of_a_stem_are_errors(refuses, changes, reason):  # noqa: F811
    assert run_stem().shape == (2, 6, 8, 8)
    with refuses(reason):
        run_stem({**STEM, **changes})


def test_wrong_epsilons_and_element_types_of_a_stem_are_errors(refuses):  # noqa: F811
    with refuses('epsilon'):
        run_stem(epsilon=0.0)
    for name in ('weight', 'shift', 'variance'):
        with refuses('element types'):
            run_stem(dtypes={name: 'float64'})


def step(size, clip, scale):
    """Takes a step on random vectors; returns (w, v, g, w', v')."""
    rng, store = np.random.default_rng(size), VariableStore(paddle.CPUPlace(), 'float64')
    w, v, g = (rng.normal(size=size) for _ in range(3))
    g *= scale
    store.set('theta', w)
    store.set('gradient', g)
    optimizer = MomentumSGD(store, 0.9, 3e-4, clip)
    store.set('velocity', v)
    optimizer.step(0.025)
    return w, v, g, store.get('theta'), store.get('velocity')


@pytest.mark.parametrize('size', [1, 17, 4096, 10_001])
@pytest.mark.parametrize('scale', [1e-3, 10.0])
def test_a_step_of_the_weights_is_that_of_numpy(size, scale):
    assert custom_ops.enabled()
    w, v, g, new_w, new_v = step(size, 5.0, scale)
    g = g * min(1, 5 / np.linalg.norm(g))
    expected = 0.9 * v + (g + 3e-4 * w)
    np.testing.assert_allclose(new_v, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(new_w, w - 0.025 * expected, rtol=1e-12, atol=1e-15)


def test_a_gradient_that_is_not_a_number_reaches_every_weight():
    w, v, g, new_w, new_v = step(5000, 5.0, np.nan)
    assert np.isnan(new_w).all() and np.isnan(new_v).all()


VECTORS = {'weights': (9,), 'velocity': (9,), 'gradient': (9,), 'momentum': (1,), 'weight_decay': (1,), 'lr': (1,)}


def run_step(shapes, dtypes=()):
    store = VariableStore(paddle.CPUPlace())
    arrays = {name: np.ones(shape, dict(dtypes).get(name, 'float32')) for name, shape in shapes.items()}

    def build():
        w, v, g, *numbers = (store.input(name, list(each.shape), str(each.dtype)) for name, each in arrays.items())
        return custom_ops.momentum_step(w, v, g, numbers)
    return StaticProgram(store, build)(**arrays)


def test_wrong_inputs_of_a_step_are_errors(refuses):  # noqa: F811
    new_w, new_v = run_step(VECTORS)                   # v' = 1 + (1 + 1), w' = 1 - 3
    assert (new_w == -2).all() and (new_v == 3).all()
    for changes, reason in ((dict(velocity=(8,)), 'vector'), (dict(gradient=(9, 1)), 'vector'),
                            (dict(lr=(2,)), 'number'), (dict(more=(1,), limit=(1,)), 'three or four')):
        with refuses(reason):
            run_step({**VECTORS, **changes})
    for name in ('velocity', 'lr'):
        with refuses('element type'):
            run_step(VECTORS, {name: 'float64'})
