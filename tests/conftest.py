import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'scripts')]

import utils  # noqa: E402,F401  before paddle: it quiets paddle's start-up notes

import pytest  # noqa: E402

pytest.register_assert_rewrite('agreement')          # so that a failure shows its numbers

import custom_ops  # noqa: E402


@pytest.fixture(scope='session', autouse=True)
def compiled():
    """Compiles the operators before any script of a test would, -> whether there are any."""
    on = custom_ops.enable()
    custom_ops.enable(False)
    return on


@pytest.fixture(scope='module', params=[False, True], ids=['paddle_ops', 'custom_ops'])
def operators(request, compiled):
    """For a whole file of tests: once with Paddle's operators, once with this project's own."""
    if request.param and not compiled:
        pytest.skip('the operators of this project could not be compiled')
    custom_ops.enable(request.param)
    yield
    custom_ops.enable(False)
