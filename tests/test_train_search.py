"""The search: both orders, crashes and resumes, seeds."""
import pytest

from kill_and_resume import results_of
from runs import history
from tiny_runs import Crash, tiny_search


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert tiny_search(folder) == 6
    return folder


@pytest.mark.parametrize('crash_after, saved', [                       # 3: at the end of the first epoch
    (2, 2), (3, 3), *(pytest.param(*numbers, marks=pytest.mark.slow) for numbers in ((0, 0), (1, 0), (5, 5)))])
def test_resumed_after_a_crash_equals_uninterrupted(tmp_path, uninterrupted, crash_after, saved):
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=crash_after)
    assert tiny_search(tmp_path, resume=True) == 6 - saved
    assert results_of(tmp_path) == results_of(uninterrupted)


@pytest.mark.slow
def test_resumed_after_a_crash_equals_uninterrupted_with_paddle_operators(tmp_path):
    tiny_search(tmp_path / 'uninterrupted', custom_ops=False)
    with pytest.raises(Crash):
        tiny_search(tmp_path / 'run', crash_after=5, custom_ops=False)
    assert tiny_search(tmp_path / 'run', resume=True, custom_ops=False) == 1
    assert results_of(tmp_path / 'run') == results_of(tmp_path / 'uninterrupted')


def test_another_seed_and_the_first_order_give_other_searches(tmp_path, uninterrupted):
    tiny_search(tmp_path / 'seed', seed=1)
    tiny_search(tmp_path / 'order', unrolled=False, epochs=4)
    lines = history(tmp_path / 'order')
    assert lines[-1]['train_loss'] < lines[0]['train_loss'] - 0.05
    alphas = [history(folder)[0]['alphas_normal'] for folder in (uninterrupted, tmp_path / 'seed', tmp_path / 'order')]
    assert alphas[0] not in alphas[1:]
