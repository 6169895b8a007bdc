import contextlib
import logging

import pytest

pytest.register_assert_rewrite('agreement')          # so that a failure shows its numbers


@pytest.fixture(autouse=True)
def reset_log():
    """Gives every test the log as it is before a script starts it."""
    yield
    log = logging.getLogger('darts')
    for handler in log.handlers:
        with contextlib.suppress(OSError):             # its disk is full
            handler.close()
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


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
