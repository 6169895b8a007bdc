import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, *(os.path.join(ROOT, folder) for folder in ('tests', 'scripts', 'scripts/bench', 'scripts/dev'))]
pytest.register_assert_rewrite('agreement')          # so that a failure shows its numbers


@pytest.fixture(scope='session')
def compiled():
    """Compiles the operators, if they are not in the cache, and returns whether they are available."""
    from engine import custom_ops
    available = custom_ops.enable()
    custom_ops.enable(False)
    return available


@pytest.fixture(scope='module', params=[False, True], ids=['paddle_ops', 'custom_ops'])
def operators(request, compiled):
    """Runs all tests of a module twice: with Paddle's operators and with the compiled ones."""
    if request.param and not compiled:
        pytest.skip('the operators of this project could not be compiled')
    from engine import custom_ops
    custom_ops.enable(request.param)
    yield
    custom_ops.enable(False)
