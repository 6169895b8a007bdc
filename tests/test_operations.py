"""Single operations and their gradients against the reference (tests/reference/discrete.py); the masks of drop path.

All use Paddle's operators: a compiled operator computes a complete cell (test_custom_ops.py).
"""
import math

import numpy as np
import paddle
import pytest

from agreement import assert_all_close, assert_close, scrambled, statistics_of
from engine.parameters import FlatParameters
from engine.programs import StaticProgram, VariableStore
from operations import OPERATIONS, Operation, SepConv, check_known, drop_path_masks, operation
from reference import discrete as reference
from utils import UserError


def run_edge(kind, channels, stride, weights, x, direction, training):
    """Returns an Edge like `reference.edge`, from the operation under test; x is a weight there, for its gradient."""
    layout = FlatParameters(running_statistics=True)
    layout.declare(['x'], x.shape)
    build_operation = operation(kind, layout, 'edge', channels, stride)
    store, values = VariableStore(paddle.CPUPlace(), 'float64'), dict(weights, x=x)
    assert {**layout.shapes, **layout.statistics.shapes} == {name: array.shape for name, array in values.items()}
    for vector, part in (('theta', layout.assign_offsets()), ('statistics', layout.statistics.assign_offsets())):
        if part.size:                                               # pools have no statistics
            store.set(vector, part.flat({name: values[name] for name in part.shapes}, np.zeros(part.size)))

    def build():
        layout.training = training
        theta = store.variable('theta', trainable=True)
        layout.unpack(theta)
        if layout.statistics.size:
            layout.statistics.unpack(store.variable('statistics'))
        output = build_operation(layout.groups[0].tensor)
        gradients = paddle.static.gradients([paddle.sum(output * store.input('direction', direction.shape))], [theta])
        if layout.statistics.size and training:
            store.assign('statistics', layout.statistics.pack())
        # Without a path from theta, as for none, the list is empty or has None, depending on the version of Paddle.
        return [output, gradients[0] if gradients and gradients[0] is not None else paddle.zeros_like(theta)]

    output, gradient = StaticProgram(store, build)(direction=direction)
    gradients = layout.named(gradient)
    statistics = layout.statistics.named(store.get('statistics')) if layout.statistics.size else {}
    return reference.Edge(output, gradients.pop('x'), gradients, statistics)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kind', OPERATIONS)
def test_an_operation_and_its_gradients_equal_the_reference(kind, stride):
    rng = np.random.default_rng(1)
    channels, size = 4, 8
    shapes = reference.Shapes()
    shapes.operation(kind, 'edge', channels, stride)
    weights = scrambled(shapes, rng)
    x = rng.normal(size=(3, channels, size, size))
    direction = rng.normal(size=(3, channels, size // stride, size // stride))
    for training in (True, False):
        result = run_edge(kind, channels, stride, weights, x, direction, training)
        expected = reference.edge(weights, kind, x, direction, stride, training)
        assert_close(result.output, expected.output)
        assert_close(result.input_gradient, expected.input_gradient)
        assert_all_close(result.gradients, expected.gradients)
        assert_all_close(result.statistics, expected.statistics if training else statistics_of(weights))


@pytest.mark.parametrize('entry', [Operation(SepConv, pool=max), Operation(identity=True)])
def test_an_entry_that_contradicts_itself_is_refused(monkeypatch, entry):
    monkeypatch.setitem(OPERATIONS, 'wrong', entry)
    with pytest.raises(UserError, match=r"OPERATIONS\['wrong'\] needs either"):
        check_known(['none', 'wrong'])


# ---------------------------------------------------------------------------------------------------
# Drop path

DRAWS, EDGES = 4000, 6


@pytest.fixture(scope='module')
def draw():
    """Returns a function (keep, seed) -> masks [DRAWS, EDGES]."""
    store = VariableStore(paddle.CPUPlace(), 'float64')

    def build():
        images = store.input('images', [None, 1])
        return [drop_path_masks(paddle.shape(images)[0], EDGES, store.input('keep', [1]))]
    program = StaticProgram(store, build)

    def masks(keep, seed):
        paddle.seed(seed)
        drawn, = program(images=np.zeros((DRAWS, 1)), keep=np.array([keep]))
        assert drawn.shape == (DRAWS, EDGES, 1, 1)
        return drawn.reshape(DRAWS, EDGES)
    return masks


@pytest.mark.parametrize('keep', [0.8, 0.35])
def test_a_mask_is_one_over_keep_with_probability_keep_and_else_zero(draw, keep):
    masks = draw(keep, seed=1)
    assert ((masks == 0) | (masks == 1 / keep)).all()
    deviation = math.sqrt(keep * (1 - keep) / masks.size)
    assert masks.size >= 20000 and abs((masks > 0).mean() - keep) < 5 * deviation


def test_masks_of_edges_and_of_samples_are_independent(draw):
    kept = (draw(0.5, seed=2) > 0).astype('float64')
    assert len(np.unique(kept, axis=1).T) == EDGES
    assert len(np.unique(kept, axis=0)) == 2 ** EDGES                # every combination of edges occurs
    limit = 5 / math.sqrt(DRAWS)
    between_edges = np.corrcoef(kept.T) - np.eye(EDGES)
    assert np.abs(between_edges).max() < limit
    for lag in (1, 2, EDGES):
        assert np.abs(np.corrcoef(kept[lag:].T, kept[:-lag].T)[:EDGES, EDGES:]).max() < limit


def test_masks_depend_on_the_seed_alone(draw):
    first = draw(0.5, seed=3)
    assert (draw(0.5, seed=3) == first).all()
    assert 0.4 < (draw(0.5, seed=4) == first).mean() < 0.6


def test_no_edge_is_dropped_with_keep_one(draw):
    assert (draw(1.0, seed=5) == 1).all()
