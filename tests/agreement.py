"""Random weights for the comparison of two networks, and assertions that their results agree."""
import math

import numpy as np

from reference.discrete import STATISTICS

TOLERANCE = 1e-9


def scrambled(shapes, rng):
    """Returns random weights {name: array} without equal values; running variances are positive."""
    return {name: rng.uniform(0.5, 2.0, shape) if name.endswith('.running_var') else
            rng.normal(1.0, 0.3, shape) if name.endswith('.weight') and len(shape) == 1 else
            rng.normal(0.0, 0.3, shape) if len(shape) == 1 else
            rng.normal(0.0, 1 / math.sqrt(math.prod(shape[1:])), shape) for name, shape in shapes.items()}


def statistics_of(weights):
    """Returns the running statistics among weights {name: array}."""
    return {name: array for name, array in weights.items() if name.endswith(STATISTICS)}


def assert_close(result, expected, what=None):
    """Asserts equal shapes and a difference below TOLERANCE, relative to the largest value if that exceeds 1."""
    assert np.shape(result) == np.shape(expected), what
    assert np.abs(result - expected).max() < TOLERANCE * max(1.0, np.abs(expected).max()), what


def assert_all_close(results, expected):
    """Asserts that two {name: array} agree."""
    assert set(results) == set(expected)
    for name in expected:
        assert_close(results[name], expected[name], name)
