import contextlib
import logging
import os
from types import SimpleNamespace

import pytest

import utils

# Before engine is imported, also by processes of the tests: the compiled operators compute float64 for the tests only.
os.environ['CXXFLAGS'] = f"{os.environ.get('CXXFLAGS', '')} -DDARTS_FLOAT64".strip()

pytest.register_assert_rewrite('agreement')          # so that a failure shows its numbers


def pytest_addoption(parser):
    parser.addoption('--use_gpu', type=utils.boolean, default=False, metavar='True|False',
                     help='compute the networks under test on a GPU, the reference on the CPU (False)')


def pytest_configure(config):
    if config.getoption('use_gpu'):
        from engine import device
        if not device.gpu_count():
            raise pytest.UsageError(f"--use_gpu True: {device.why_no_gpu()}")


@pytest.fixture(scope='session', autouse=True)
def use_gpu(request):
    """Computes on the GPU with --use_gpu True; returns whether it is so."""
    wanted = request.config.getoption('use_gpu')
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            compute_on_gpu(patch)
        yield wanted


def compute_on_gpu(patch):
    """Gives stores of the project the GPU in place of the CPU; the reference stays on the CPU.

    The patches of the reference undo what Paddle computes on the CPU only: the variance that it divides by goes into
    the running variance, cuDNN takes the unbiased estimate; it scales the gradient of an average pool in single
    precision. Algorithms are deterministic, because some tests compare two runs bitwise.
    """
    import paddle

    from engine import device
    from engine.programs import VariableStore
    from reference import discrete, supernet

    place = device.find_place(True)
    device.prepare(place, deterministic=True)
    init, norm, guard = VariableStore.__init__, discrete.Pass.norm, paddle.base.dygraph.guard

    def init_on_gpu(store, given, *args, **settings):
        init(store, place if isinstance(given, paddle.CPUPlace) else given, *args, **settings)

    def norm_with_unbiased_variance(network, x, name):
        result, key = norm(network, x, name), f'{name}.running_var'
        if network.training:
            biased, before = network.statistics[key], network.w[key].numpy()
            images_and_pixels = x.shape[0] * x.shape[2] * x.shape[3]
            network.statistics[key] = biased + (biased - discrete.MOMENTUM * before) / (images_and_pixels - 1)
        return result

    patch.setattr(VariableStore, '__init__', init_on_gpu)
    patch.setattr(discrete.Pass, 'norm', norm_with_unbiased_variance)
    patch.setattr(supernet, 'custom_ops', SimpleNamespace(enabled=lambda: True))     # selects the exact average pool
    # Without a place it is the GPU, wherever there is one.
    patch.setattr(paddle.base.dygraph, 'guard', lambda given=None: guard(given or paddle.CPUPlace()))


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
def compiled(use_gpu):
    """Compiles the operators, if they are not in the cache, and returns whether they are available: on the CPU only."""
    if use_gpu:
        return False
    from engine import custom_ops
    available = custom_ops.enable()
    custom_ops.enable(False)
    return available


@pytest.fixture(scope='module')
def compiled_operators(compiled):
    """Runs all tests of a module with the compiled operators."""
    if not compiled:
        pytest.skip('the compiled operators are not available')
    from engine import custom_ops
    custom_ops.enable()
    yield
    custom_ops.enable(False)


@pytest.fixture(scope='module', params=[False, True], ids=['paddle_ops', 'custom_ops'])
def operators(request, compiled):
    """Runs all tests of a module twice: with Paddle's operators and with the compiled ones."""
    if request.param and not compiled:
        pytest.skip('the operators of this project could not be compiled, or the tests run on a GPU')
    from engine import custom_ops
    custom_ops.enable(request.param)
    yield
    custom_ops.enable(False)
