"""The search with partial channels (PC-DARTS): recipe, derivation by hand, runs, drawing, conversion.

tests/test_model_search.py and tests/test_architect.py compare its supernet and its update of alpha with the reference.
"""
import json

import numpy as np
import pytest

import genotypes
import train_search
import visualize
from convert_weights import check_supernet, read_supernet
from engine import checkpoint
from genotypes import SearchSpace
from kill_and_resume import results_of
from model import NetworkCIFAR, NetworkImageNet
from model_search import Supernet
from runs import assert_one_line, checkpoint_names, history, run_in_process
from tiny_runs import Crash, tiny_search
from utils import UserError


def test_number_of_weights_and_of_architecture_parameters():
    supernet = Supernet(16, 10, 8, partial_channels=4, build_programs=False)
    assert supernet.size == 299_578
    assert {name: array.shape for name, array in supernet.alphas().items()} == {
        'alphas_normal': (14, 8), 'alphas_reduce': (14, 8), 'betas_normal': (14,), 'betas_reduce': (14,)}
    assert 0 < np.abs(supernet.alphas()['betas_normal']).max() < 1e-2           # initial values


@pytest.mark.parametrize('channels, partial', [(16, 3), (4, 8), (16, 0)])
def test_channels_that_cannot_be_divided(channels, partial):
    with pytest.raises(UserError, match='has to divide init_channels'):
        Supernet(channels, 10, 3, partial_channels=partial, build_programs=False)


def test_the_genotype_multiplies_operations_by_edges(operators):
    """Node 1 by hand: products 0.9 * 0.1, 0.5 * 0.5 and 0.6 * 0.4, so states 1 and 2; without beta states 0 and 2."""
    supernet = Supernet(2, 5, 3, image_size=8, space=SearchSpace(('none', 'skip_connect', 'sep_conv_3x3'), 2),
                        partial_channels=2)
    table = np.array([[0.1, 0.5, 0.4], [0.1, 0.1, 0.8], [0.05, 0.9, 0.05], [0.2, 0.3, 0.5], [0.3, 0.1, 0.6]])
    edges = np.array([0.7, 0.3, 0.1, 0.5, 0.4])
    supernet.set_alphas({'alphas_normal': np.log(table), 'betas_normal': np.log(edges)})
    weights = supernet.mixing_weights()
    np.testing.assert_allclose(weights['alphas_normal'], table, atol=1e-6)
    np.testing.assert_allclose(weights['betas_normal'], edges, atol=1e-6)
    assert supernet.genotype().normal == (('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1),
                                          ('sep_conv_3x3', 2))
    np.testing.assert_allclose(weights['betas_reduce'][:2].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(weights['betas_reduce'][2:].sum(), 1, rtol=1e-6)
    with pytest.raises(UserError, match="'betas_upsample': there are alphas_normal, .*betas_reduce"):
        supernet.set_alphas({'betas_upsample': edges})


def test_the_recipe_sets_defaults_that_flags_override():
    darts, recipe = train_search.parse_args([]), train_search.parse_args(['--recipe', 'pc_darts'])
    expected = dict(recipe='pc_darts', partial_channels=4, batch_size=256, learning_rate=0.1, learning_rate_min=0.0,
                    unrolled=False, arch_learning_rate=6e-4, arch_start_epoch=15)
    assert {name for name, value in vars(recipe).items() if value != getattr(darts, name)} == set(expected)
    assert {name: getattr(recipe, name) for name in expected} == expected and recipe.epochs == 50
    changed = train_search.parse_args(['--recipe=pc_darts', '--unrolled', 'True', '--batch_size', '64'])
    assert (changed.unrolled, changed.batch_size, changed.partial_channels) == (True, 64, 4)


def test_an_unknown_recipe(capsys):
    with pytest.raises(SystemExit):
        train_search.parse_args(['--recipe', 'enas'])
    assert "'enas' (choose from" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# Runs

PARTIAL = dict(partial_channels=2, init_channels=4)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert tiny_search(folder, **PARTIAL) == 6
    return folder


def test_a_resumed_search_equals_an_uninterrupted_one(tmp_path, uninterrupted):
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=5, **PARTIAL)
    assert tiny_search(tmp_path, resume=True, **PARTIAL) == 1
    assert results_of(tmp_path) == results_of(uninterrupted)
    with pytest.raises(UserError, match='partial_channels 2 there, 1 now'):
        tiny_search(tmp_path, resume=True, init_channels=4)


def test_history_log_and_drawing_have_the_weights_of_the_edges(uninterrupted, capsys):
    line = history(uninterrupted)[-1]
    assert [len(row) for row in line['betas_normal']] == [2, 3, 4, 5]
    assert all(sum(row) == pytest.approx(1, abs=1e-6) for row in line['betas_normal'] + line['betas_reduce'])
    epochs = visualize.read_history(str(uninterrupted / 'history.jsonl'))
    assert epochs[-1].edges['reduce'].tolist() == sum(line['betas_reduce'], [])
    for panel in visualize.draw_alphas(epochs).axes:
        kind, state, node = panel.get_label().split()
        assert panel.get_title().endswith(f", {line[f'betas_{kind}'][int(node)][int(state)]:.3f}")


def test_a_log_shows_the_weights_of_the_edges():
    space = SearchSpace(('none', 'skip_connect'), 2)
    text = train_search.format_table('betas_normal', space.by_node(np.array([0.25, 0.75, 0.5, 0.125, 0.375])),
                                     space.node_names, space.state_names)
    assert text.splitlines() == ['mixing weights of betas_normal', '        state 0  state 1  state 2',
                                 'node 2   0.2500   0.7500', 'node 3   0.5000   0.1250   0.3750']


@pytest.mark.parametrize('change, reason', [
    (lambda lines: lines[1].pop('betas_reduce'), 'betas'),
    (lambda lines: lines[0].update(betas_normal=[[0.5, 0.5]]), 'betas have to be 14 numbers'),
    (lambda lines: lines[0].update(betas_normal=[[0.1] * 14]), 'betas have to be 14 numbers'),
    (lambda lines: lines[0]['betas_reduce'][3].__setitem__(1, 9.0), 'betas have to be 14 numbers')])
def test_a_history_with_damaged_betas(tmp_path, uninterrupted, change, reason):
    lines = history(uninterrupted)
    change(lines)
    path = tmp_path / 'history.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    with pytest.raises(UserError, match=reason):
        visualize.read_history(str(path))


def test_the_first_epochs_do_not_update_alpha(tmp_path):
    states = []
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=3, arch_start_epoch=1, **PARTIAL)         # at the end of the first epoch
    for _ in range(2):
        states.append(checkpoint.read_checkpoint(str(tmp_path / checkpoint_names(tmp_path)[-1]))[1])
        tiny_search(tmp_path, resume=True, arch_start_epoch=1, **PARTIAL)
    seed = train_search.parse_args([]).seed
    initial = Supernet(4, 10, 3, seed=seed, partial_channels=2, build_programs=False).store
    assert states[0]['alphas'].tobytes() == initial.get('alphas').tobytes() and states[0]['adam_steps'] == 0
    assert not np.array_equal(states[0]['theta'], initial.get('theta'))
    assert states[1]['adam_steps'] == 3 and not np.array_equal(states[0]['alphas'], states[1]['alphas'])


def test_a_checkpoint_is_converted_with_its_betas(uninterrupted):
    path = str(uninterrupted / checkpoint_names(uninterrupted)[-1])
    space, partial_channels, weights = read_supernet(path)
    assert partial_channels == 2
    state = checkpoint.read_checkpoint(path)[1]
    names = ['alphas_normal', 'alphas_reduce', 'betas_normal', 'betas_reduce']
    assert np.concatenate([weights[name].reshape(-1) for name in names]).tobytes() == state['alphas'].tobytes()
    checked = check_supernet(weights, space)
    assert all(np.array_equal(checked[name], weights[name]) for name in weights) and set(checked) == set(weights)
    with pytest.raises(UserError, match='betas_reduce is missing'):
        check_supernet({name: array for name, array in weights.items() if name != 'betas_reduce'}, space)


def test_an_older_checkpoint_is_continued(tmp_path):
    """Its alphas are [2, edges, primitives], and its settings lack the flags of this file."""
    for folder in ('new', 'old'):
        with pytest.raises(Crash):
            tiny_search(tmp_path / folder, crash_after=5)
    path = str(tmp_path / 'old' / checkpoint_names(tmp_path / 'old')[-1])
    metadata, state = checkpoint.read_checkpoint(path)
    for name in checkpoint.ADDED_FLAGS:
        del metadata['settings'][name]
    for name in ('alphas', 'adam_mean', 'adam_variance'):
        state[name] = state[name].reshape(2, 14, 8)
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, metadata, state)
    for folder in ('new', 'old'):
        assert tiny_search(tmp_path / folder, resume=True) == 1
    new, old = (results_of(tmp_path / folder) for folder in ('new', 'old'))
    assert new['history.jsonl'] == old['history.jsonl'] and new['genotype.json'] == old['genotype.json']


@pytest.mark.parametrize('primitives', [('skip_connect', 'max_pool_3x3'), ('max_pool_3x3', 'none'),
                                        ('skip_connect', 'dil_conv_3x3')])
def test_weights_of_spaces_with_few_convolutions_are_converted(tmp_path, primitives):
    """K follows from a convolution of the first cell or of the first reduction cell, or is recorded."""
    space = SearchSpace(primitives, 2)
    supernet = Supernet(4, 10, 3, space=space, partial_channels=2, build_programs=False)
    weights = {**supernet.weights(), **supernet.alphas()}
    for recorded in (2, *[None] * (primitives != ('max_pool_3x3', 'none'))):
        assert set(check_supernet(weights, space, recorded)) == set(weights)


def test_pretrained_weights_with_another_number_of_partial_channels(tmp_path):
    supernet = Supernet(4, 10, 3, partial_channels=2, build_programs=False)
    path = tmp_path / 'supernet.npz'
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, {'partial_channels': 2}, {**supernet.weights(), **supernet.alphas()})
    done = run_in_process('train_search.py', '--dataset', 'fashion_mnist_sample', '--init_channels', 4, '--layers', 3,
                          '--model_save_dir', tmp_path / 'run', '--pretrained', path)
    assert_one_line(done, f'{path} is of a supernet with partial_channels 2: give --partial_channels 2')


def test_no_rule_ends_the_search_before_alpha_is_updated(tmp_path):
    """With --stop_at_skips 1 every genotype of the initial alpha would end it; after updates the rule counts."""
    settings = dict(arch_start_epoch=2, epochs=3, stop_at_skips=1, partial_channels=1)
    steps = tiny_search(tmp_path, seed=seed_with_skips(), **settings)
    assert steps == 9 and len(history(tmp_path)) == 3
    assert genotypes.skip_connects(genotypes.check(history(tmp_path)[0]['genotype'])) > 0


def seed_with_skips():
    """Returns a seed whose initial alpha has a skip_connect in its genotype."""
    for seed in range(100):
        tables = Supernet(2, 10, 3, seed=seed, build_programs=False).alphas().values()
        mixing = (np.exp(table) / np.exp(table).sum(axis=1, keepdims=True) for table in tables)
        if genotypes.skip_connects(genotypes.derive(genotypes.DARTS_SPACE, *mixing)) > 0:
            return seed


@pytest.mark.parametrize('flags, reason', [
    ('--recipe pc_darts --epochs 15', 'alpha would never be updated in 15 epochs'),
    ('--recipe pc_darts --epochs 23 --curvature_freq 1 --stop_at_curvature 1.3', 'needs 9 evaluations after updates'),
    ('--curvature_freq 6 --stop_at_curvature 1.3', 'a smaller --curvature_freq than 6'),
    ('--epochs 9 --curvature_freq 1 --stop_at_curvature 1.3', 'and 10 epochs')])
def test_settings_that_can_have_no_effect(flags, reason, capsys):
    with pytest.raises(SystemExit):
        train_search.parse_args(flags.split())
    assert reason in capsys.readouterr().err


def test_published_cells_have_the_published_sizes():
    """3.6 M weights on CIFAR-10, 5.3 M on ImageNet (arXiv 1907.05737, tables 1 and 2)."""
    cifar = NetworkCIFAR(genotypes.PC_DARTS_CIFAR, 36, 10, 20, build_programs=False)
    imagenet = NetworkImageNet(genotypes.PC_DARTS_IMAGENET, 48, 1000, 14, build_programs=False)
    assert [round(network.size / 1e6, 1) for network in (cifar, imagenet)] == [3.6, 5.3]
