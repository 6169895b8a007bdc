"""The parameters of tests that run with both operator sets."""
import pytest


def on_both_operator_sets(arguments, cases, slow=()):
    """Returns a parametrization of the fixture `operators` and the arguments: every case with both operator sets.

    cases: {id: values of the arguments}; those in `slow` are slow tests with Paddle's operators.
    """
    return pytest.mark.parametrize(f'operators, {arguments}', [
        pytest.param(compiled, *values, id=f"{'custom_ops' if compiled else 'paddle_ops'}-{name}",
                     marks=[pytest.mark.slow] if name in slow and not compiled else [])
        for compiled in (False, True) for name, values in cases.items()], indirect=['operators'])
