"""The search: both orders, crashes and resumes, seeds; random genotypes."""
import os

import pytest

import genotypes
from genotypes import DARTS_SPACE, SearchSpace
from kill_and_resume import results_of
from runs import assert_one_line, history, output_of, run_in_process
from tiny_runs import Crash, tiny_search


@pytest.fixture(scope='module', params=[True])
def uninterrupted(tmp_path_factory, request):
    """The folder of an uninterrupted search; the parameter is --custom_ops."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert tiny_search(folder, custom_ops=request.param) == 6
    return folder


@pytest.mark.parametrize('uninterrupted, crash_after, saved', [        # 3: at the end of the first epoch
    (True, 2, 2), (True, 3, 3), *(pytest.param(*values, marks=pytest.mark.slow) for values in (
        (True, 0, 0), (True, 1, 0), (True, 5, 5), (False, 5, 5)))], indirect=['uninterrupted'])
def test_resumed_after_a_crash_equals_uninterrupted(tmp_path, request, uninterrupted, crash_after, saved):
    custom_ops = request.node.callspec.params['uninterrupted']
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=crash_after, custom_ops=custom_ops)
    assert tiny_search(tmp_path, resume=True, custom_ops=custom_ops) == 6 - saved
    assert results_of(tmp_path) == results_of(uninterrupted)


def test_another_seed_and_the_first_order_give_other_searches(tmp_path, uninterrupted):
    tiny_search(tmp_path / 'seed', seed=1)
    tiny_search(tmp_path / 'order', unrolled=False, epochs=4)
    lines = history(tmp_path / 'order')
    assert lines[-1]['train_loss'] < lines[0]['train_loss'] - 0.05
    alphas = [history(folder)[0]['alphas_normal'] for folder in (uninterrupted, tmp_path / 'seed', tmp_path / 'order')]
    assert alphas[0] not in alphas[1:]


def test_a_random_genotype_without_a_search(tmp_path):
    folder = tmp_path / 'random'
    flags = ['--random', '--seed', 3, '--nodes', 3, '--model_save_dir', folder]
    output = output_of('train_search.py', *flags)
    expected = genotypes.draw(SearchSpace(DARTS_SPACE.primitives, 3), 3)
    assert genotypes.load(str(folder / 'genotype.json')) == expected == genotypes.parse(output)
    assert f'python train.py --arch {folder}/genotype.json' in output and os.listdir(folder) == ['genotype.json']
    assert_one_line(run_in_process('train_search.py', *flags), f'{folder} is not empty', '--model_save_dir')
    assert_one_line(run_in_process('train_search.py', *flags, '--resume'), 'nothing to --resume')
    assert_one_line(run_in_process('train_search.py', '--random', '--model_save_dir', '/dev/null/x'), 'cannot write')
