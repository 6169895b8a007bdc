"""Each operation and its gradients against the plain one (plain_discrete.py), in float64; the masks of drop path.

These are Paddle's operators. custom_ops knows whole cells only: test_custom_ops.py.
"""
import math

import numpy as np
import paddle
import pytest

from reference import discrete as plain
from agreement import assert_all_close, assert_close, scrambled, statistics_of
from genotypes import OPERATIONS
from operations import drop_path_masks, operation
from engine.parameters import FlatParameters
from engine.programs import StaticProgram, VariableStore


def run_edge(kind, channels, stride, weights, x, direction, training):
    """What plain.edge does, by the operation under test; its input is a weight too, for its gradient."""
    layout = FlatParameters(running_statistics=True)
    layout.declare(['x'], x.shape)
    build_operation = operation(kind, layout, 'edge', channels, stride)
    store, values = VariableStore(paddle.CPUPlace(), 'float64'), dict(weights, x=x)
    assert {**layout.shapes, **layout.statistics.shapes} == {name: array.shape for name, array in values.items()}
    for vector, part in (('theta', layout.assign_offsets()), ('statistics', layout.statistics.assign_offsets())):
        if part.size:                                               # a pool keeps no statistics
            store.set(vector, part.flat({name: values[name] for name in part.shapes}, np.zeros(part.size)))

    def build():
        layout.training = training
        theta = store.variable('theta', trainable=True)
        layout.unpack(theta)
        if layout.statistics.size:
            layout.statistics.unpack(store.variable('statistics'))
        output = build_operation(layout.groups[0].tensor)
        gradient, = paddle.static.gradients([paddle.sum(output * store.input('direction', direction.shape))], [theta])
        if layout.statistics.size and training:
            store.assign('statistics', layout.statistics.pack())
        return [output, gradient]

    output, gradient = StaticProgram(store, build)(direction=direction)
    gradients = layout.named(gradient)
    statistics = layout.statistics.named(store.get('statistics')) if layout.statistics.size else {}
    return plain.Edge(output, gradients.pop('x'), gradients, statistics)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kind', OPERATIONS)
def test_an_operation_and_its_gradients_equal_the_plain_ones(kind, stride):
    rng = np.random.default_rng(1)
    channels, size = 4, 8
    shapes = plain.Shapes()
    shapes.operation(kind, 'edge', channels, stride)
    weights = scrambled(shapes, rng)
    x = rng.normal(size=(3, channels, size, size))
    direction = rng.normal(size=(3, channels, size // stride, size // stride))
    for training in (True, False):
        ours = run_edge(kind, channels, stride, weights, x, direction, training)
        expected = plain.edge(weights, kind, x, direction, stride, training)
        assert_close(ours.output, expected.output)
        assert_close(ours.input_gradient, expected.input_gradient)
        assert_all_close(ours.gradients, expected.gradients)
        assert_all_close(ours.statistics, expected.statistics if training else statistics_of(weights))


# ---------------------------------------------------------------------------------------------------
# Drop path

DRAWS, EDGES = 4000, 6


@pytest.fixture(scope='module')
def draw():
    """(keep, seed) -> masks [DRAWS, EDGES]."""
    store = VariableStore(paddle.CPUPlace(), 'float64')

    def build():
        images = store.input('images', [None, 1])
        return [drop_path_masks(paddle.shape(images)[0], EDGES, store.input('keep', [1]))]
    function = StaticProgram(store, build)

    def masks(keep, seed):
        paddle.seed(seed)
        drawn, = function(images=np.zeros((DRAWS, 1)), keep=np.array([keep]))
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
    assert len(np.unique(kept, axis=0)) == 2 ** EDGES                # every combination of edges comes up
    limit = 5 / math.sqrt(DRAWS)
    between_edges = np.corrcoef(kept.T) - np.eye(EDGES)
    assert np.abs(between_edges).max() < limit
    for lag in (1, 2, EDGES):
        assert np.abs(np.corrcoef(kept[lag:].T, kept[:-lag].T)[:EDGES, EDGES:]).max() < limit


def test_masks_repeat_with_the_seed_and_only_with_it(draw):
    first = draw(0.5, seed=3)
    assert (draw(0.5, seed=3) == first).all()
    assert 0.4 < (draw(0.5, seed=4) == first).mean() < 0.6


def test_nothing_is_dropped_with_keep_one(draw):
    assert (draw(1.0, seed=5) == 1).all()


# DARTS_V1 has identities in both kinds of cell, and skip_connect with stride 2 is in DARTS_PADDLE's reduction cell.
