"""Weights for a comparison of two networks, and when their figures agree."""
import math

import numpy as np

from reference.discrete import STATISTICS

TOLERANCE = 1e-9


def scrambled(shapes, rng):
    """Weights that leave nothing equal; variances are positive."""
    return {name: rng.uniform(0.5, 2.0, shape) if name.endswith('.running_var') else
            rng.normal(1.0, 0.3, shape) if name.endswith('.weight') and len(shape) == 1 else
            rng.normal(0.0, 0.3, shape) if len(shape) == 1 else
            rng.normal(0.0, 1 / math.sqrt(math.prod(shape[1:])), shape) for name, shape in shapes.items()}


def statistics_of(weights):
    return {name: array for name, array in weights.items() if name.endswith(STATISTICS)}


def assert_close(ours, expected, what=None):
    assert np.shape(ours) == np.shape(expected), what
    assert np.abs(ours - expected).max() < TOLERANCE * max(1.0, np.abs(expected).max()), what


def assert_all_close(ours, expected):
    assert set(ours) == set(expected)
    for name in expected:
        assert_close(ours[name], expected[name], name)
