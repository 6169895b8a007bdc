"""The batched supernet against the edge-by-edge reference (tests/reference/supernet.py), in float64."""
import doctest
import functools

import numpy as np
import pytest

import model_search
from agreement import scrambled
from architect import Architect
from engine import custom_ops
from engine.optimizers import MomentumSGD
from genotypes import DARTS_SPACE, SearchSpace
from model_search import Supernet
from operator_sets import on_both_operator_sets
from reference import supernet as reference
from utils import UserError

CLASSES = 5


@functools.cache
def shared_supernet(compiled, *arguments, **settings):
    return Supernet(*arguments, **settings)


@pytest.fixture
def supernet_of(operators):
    """Supernet, but equal arguments return the same supernet: `randomize` sets all of its weights and alpha."""
    return functools.partial(shared_supernet, custom_ops.enabled())


def randomize(supernet, seed=0):
    """Sets random weights and alpha without equal values; returns both by name, and a random batch of 4 images."""
    rng = np.random.default_rng(seed)
    weights = scrambled(supernet.shapes, rng)
    alphas = {name: rng.normal(0, 1, array.shape) for name, array in supernet.alphas().items()}
    supernet.set_weights(weights)
    supernet.set_alphas(alphas)
    size = supernet.image_size
    return weights, alphas, (rng.normal(size=(4, 3, size, size)), rng.integers(0, CLASSES, (4, 1)))


def assert_equals_reference(supernet, weights, alphas, batch, channels, layers, tolerance=1e-9):
    """Asserts that loss, accuracies and all gradients agree with the reference; returns the supernet's Gradients."""
    result = supernet.gradients(*batch)
    loss, logits, weight_gradients, alpha_gradients = reference.gradients(
        weights, alphas, *batch, channels, layers, supernet.space.primitives, supernet.space.nodes,
        supernet.partial_channels)
    assert abs(result.loss - loss) < tolerance
    assert result.loss == pytest.approx(supernet.evaluate(*batch).loss, abs=tolerance)
    correct = np.argsort(-logits, axis=1) == batch[1]
    assert result[1:3] == pytest.approx([correct[:, :k].any(axis=1).mean() for k in (1, 5)])
    for gradients, expected in ((result.weights, weight_gradients), (result.alphas, alpha_gradients)):
        assert set(gradients) == set(expected)
        for name, gradient in expected.items():
            scale = max(1.0, np.abs(gradient).max())
            assert np.abs(gradients[name] - gradient).max() < tolerance * scale, name
    return result


# 3 layers: a normal and two reduction cells; 4: a normal cell after a reduction cell too; 6: normal after normal too.
@on_both_operator_sets('channels, layers, image_size', {
    '2-3-8': (2, 3, 8), '4-4-16': (4, 4, 16), '2-6-8': (2, 6, 8)}, slow=['4-4-16', '2-6-8'])
def test_loss_and_all_gradients_equal_the_reference(supernet_of, channels, layers, image_size):
    supernet = supernet_of(channels, CLASSES, layers, 'float64', image_size=image_size)
    weights, alphas, batch = randomize(supernet)
    result = assert_equals_reference(supernet, weights, alphas, batch, channels, layers)
    assert min(np.abs(gradient).max() for gradient in result.weights.values()) > 0
    # The alpha of none (column 0) has a gradient too, through the softmax.
    assert all((np.abs(gradient) > 0).all() for gradient in result.alphas.values())


# Names and number of nodes. The compiled operator computes all of these spaces.
PRIMITIVES = DARTS_SPACE.primitives
SPACES = {'without_none': (PRIMITIVES[1:], 4), 's2': (('skip_connect', 'sep_conv_3x3'), 4),
          's2_reversed': (('sep_conv_3x3', 'skip_connect'), 4), 'reversed': (PRIMITIVES[::-1], 2),
          'with_sep_conv_7x7': ((*PRIMITIVES, 'sep_conv_7x7'), 2),
          '1_node': (PRIMITIVES, 1), '3_nodes': (PRIMITIVES, 3), '5_nodes': (PRIMITIVES, 5),
          'one_convolution': (('dil_conv_3x3',), 2), 'one_pool': (('max_pool_3x3',), 2),
          'only_skip_connect': (('none', 'skip_connect'), 2)}


@on_both_operator_sets('name', {name: [name] for name in SPACES},
                       slow=['without_none', 'reversed', '3_nodes', '5_nodes'])
def test_loss_and_all_gradients_in_another_search_space(operators, name):
    space = SearchSpace(*SPACES[name])
    supernet = Supernet(2, CLASSES, 3, 'float64', image_size=8, space=space)
    assert supernet.compiled == custom_ops.enabled()
    weights, alphas, batch = randomize(supernet)
    assert supernet.shapes == reference.weight_shapes(2, CLASSES, 3, *SPACES[name])
    assert_equals_reference(supernet, weights, alphas, batch, 2, 3)
    if custom_ops.enabled():                                         # the program that leaves out other gradients
        expected = supernet.store.get('alpha_gradient')
        supernet.store.set('alpha_gradient', np.zeros_like(expected))
        supernet.compute_alpha_gradient(supernet.feed(*batch))
        np.testing.assert_array_equal(supernet.store.get('alpha_gradient'), expected)


# Partial channels K, channels, layers, name of the space. With Paddle's operators most of them take long.
PARTIAL = {'-'.join(map(str, case)): case for case in (
    (2, 4, 4, None), (4, 8, 3, None), (4, 4, 3, '3_nodes'), (2, 6, 3, 'with_sep_conv_7x7'), (2, 2, 3, '1_node'),
    (2, 4, 3, 's2_reversed'), (3, 6, 3, 'one_pool'), (2, 2, 3, 'only_skip_connect'), (2, 4, 3, 'one_convolution'))}


@on_both_operator_sets('partial, channels, layers, name', PARTIAL,
                       slow=set(PARTIAL) - {'2-4-3-s2_reversed', '3-6-3-one_pool'})
def test_partial_channels(operators, partial, channels, layers, name):
    primitives, nodes = SPACES[name] if name else (PRIMITIVES, 4)
    supernet = Supernet(channels, CLASSES, layers, 'float64', image_size=8, space=SearchSpace(primitives, nodes),
                        partial_channels=partial)
    assert supernet.compiled == custom_ops.enabled()
    weights, alphas, batch = randomize(supernet)
    assert list(alphas) == ['alphas_normal', 'alphas_reduce', 'betas_normal', 'betas_reduce']
    assert supernet.shapes == reference.weight_shapes(channels, CLASSES, layers, primitives, nodes, partial)
    result = assert_equals_reference(supernet, weights, alphas, batch, channels, layers)
    if nodes > 1:           # of one primitive alpha has no gradient, and of one edge beta
        assert min(np.abs(result.alphas[f'betas_{kind}']).max() for kind in ('normal', 'reduce')) > 0


@pytest.mark.parametrize('batch_size, image_size', [(1, 4), (1, 20), (5, 12)])
@pytest.mark.parametrize('operators', [True], ids=['custom_ops'], indirect=True)
def test_odd_sizes_and_one_image(operators, batch_size, image_size):
    """Planes of 1, 3 and 5 pixels, and a batch that two threads cannot share."""
    supernet = Supernet(6, CLASSES, 3, 'float64', image_size=image_size, space=SearchSpace(PRIMITIVES, 2))
    weights, alphas, _ = randomize(supernet)
    rng = np.random.default_rng(1)
    batch = rng.normal(size=(batch_size, 3, image_size, image_size)), rng.integers(0, CLASSES, (batch_size, 1))
    assert_equals_reference(supernet, weights, alphas, batch, 6, 3)


def test_permuted_edges_and_operations(supernet_of):
    """Weights of cell 0 and rows and columns of alpha are permuted: a supernet that mixes up edges would not agree."""
    supernet = supernet_of(2, CLASSES, 3, 'float64', image_size=8)
    weights, alphas, batch = randomize(supernet)
    before = supernet.gradients(*batch).loss
    rng = np.random.default_rng(5)
    order = rng.permutation(14)
    permuted = dict(weights)
    for name in weights:
        parts = name.split('.')
        if name.startswith('cells.0._ops.'):                         # in cell 0 all operations have stride 1
            permuted[name] = weights['.'.join(parts[:3] + [str(order[int(parts[3])])] + parts[4:])]
    permuted_alphas = {'alphas_normal': alphas['alphas_normal'][order][:, rng.permutation(8)],
                       'alphas_reduce': alphas['alphas_reduce'][rng.permutation(14)]}
    supernet.set_weights(permuted)
    supernet.set_alphas(permuted_alphas)
    after = assert_equals_reference(supernet, permuted, permuted_alphas, batch, 2, 3).loss
    assert abs(after - before) > 1e-3


def test_float32_agrees_within_its_precision(supernet_of):
    supernet = supernet_of(2, CLASSES, 3, 'float32', image_size=8)
    weights, alphas, batch = randomize(supernet)
    loss = reference.gradients(weights, alphas, *batch, 2, 3)[0]
    assert supernet.gradients(*batch).loss == pytest.approx(loss, rel=1e-5)


def test_warm_up_changes_no_vector(supernet_of):
    supernet = supernet_of(2, CLASSES, 3, 'float32', image_size=8)
    _, _, batch = randomize(supernet)
    architect = Architect(supernet)
    architect.step(batch, batch, 0.1)
    names = ('theta', 'velocity', 'alphas', 'adam_mean', 'adam_variance', 'gradient', 'alpha_gradient', 'd_alpha')
    before = {name: supernet.store.get(name).tobytes() for name in names}
    supernet.store.warm_up()
    assert before == {name: supernet.store.get(name).tobytes() for name in names}


@pytest.mark.parametrize('operators, limit', [pytest.param(False, 4700, id='paddle_ops', marks=pytest.mark.slow),
                                              pytest.param(True, 1000, id='custom_ops')], indirect=['operators'])
def test_number_of_operators_of_the_default_search(operators, limit):
    """The time that an executor takes to prepare a program grows faster than the number of operators."""
    supernet = Supernet()
    Architect(supernet, MomentumSGD(supernet.store, 0.9, 3e-4, 5.0))
    assert custom_ops.enabled() == (limit == 1000) and supernet.store.operators <= limit


# ---------------------------------------------------------------------------------------------------
# Without programs: the operators make no difference

def without_programs(*arguments, **settings):
    return Supernet(*arguments, **settings, build_programs=False)


def test_names_and_shapes_equal_those_of_the_authors():
    for channels, classes, layers in ((2, 5, 3), (4, 10, 5), (2, 7, 8)):
        assert without_programs(channels, classes, layers).shapes == reference.weight_shapes(channels, classes, layers)


def test_size_of_the_default_supernet():
    assert sum(int(np.prod(shape)) for shape in reference.weight_shapes(16, 10, 8).values()) == 1930618
    assert without_programs().size == 1930618


def test_unknown_primitives_are_refused():
    with pytest.raises(UserError, match="unknown operation 'conv_9x9': .* has none, max_pool_3x3, .*conv_7x1_1x7"):
        without_programs(2, CLASSES, 3, space=SearchSpace(('skip_connect', 'conv_9x9')))


def test_weights_and_alpha_are_read_back_unchanged():
    supernet = without_programs(2, CLASSES, 3, 'float64')
    weights, alphas, _ = randomize(supernet)
    for name, array in {**supernet.weights(), **supernet.alphas()}.items():
        np.testing.assert_array_equal(array, {**weights, **alphas}[name])
    supernet.set_weights({'classifier.bias': np.arange(5.0)})        # other weights keep their values
    np.testing.assert_array_equal(supernet.weights()['classifier.bias'], np.arange(5.0))
    np.testing.assert_array_equal(supernet.weights()['stem.0.weight'], weights['stem.0.weight'])


def test_initial_values():
    supernet = without_programs(16, 10, 3, seed=1)
    weights = supernet.weights()
    for name, array in weights.items():
        if name == 'stem.1.weight':
            assert (array == 1).all()
        elif name == 'stem.1.bias':
            assert (array == 0).all()
        else:
            fan_in = np.prod(array.shape[1:]) if array.ndim > 1 else weights['classifier.weight'].shape[1]
            assert np.abs(array).max() <= fan_in ** -0.5
            assert array.size < 100 or np.std(array) == pytest.approx((3 * fan_in) ** -0.5, rel=0.2)
    alphas = np.stack(list(supernet.alphas().values()))
    assert np.std(alphas) == pytest.approx(1e-3, rel=0.2) and np.abs(np.mean(alphas)) < 3e-4
    same, other = without_programs(16, 10, 3, seed=1), without_programs(16, 10, 3, seed=2)
    assert same.store.get('theta').tobytes() == supernet.store.get('theta').tobytes()
    assert other.store.get('theta').tobytes() != supernet.store.get('theta').tobytes()


@pytest.mark.parametrize('arguments, reason', [
    (dict(layers=2), 'layers is 2'), (dict(channels=5), 'init_channels is 5'), (dict(channels=0), 'init_channels is 0'),
    (dict(image_size=30), '30 x 30')])
def test_sizes_that_cannot_be_built(arguments, reason):
    with pytest.raises(UserError, match=reason):
        Supernet(**arguments)


@pytest.mark.parametrize('weights, alphas, reason', [
    ({'stem.9.weight': np.zeros(3)}, {}, "unknown weight 'stem.9.weight'"),
    ({'stem.1.bias': np.zeros(3)}, {}, r'stem.1.bias has shape \[3\], expected \[6\]'),
    ({}, {'alphas': np.zeros((14, 8))}, 'unknown alpha'),
    ({}, {'alphas_normal': np.zeros((14, 7))}, r'alphas_normal has shape \[14, 7\]')])
def test_unknown_names_and_wrong_shapes_are_refused(weights, alphas, reason):
    supernet = without_programs(2, CLASSES, 3)
    with pytest.raises(UserError, match=reason):
        supernet.set_weights(weights)
        supernet.set_alphas(alphas)


@pytest.mark.parametrize('operators', [True], ids=['custom_ops'], indirect=True)
def test_the_example_in_the_docstring(operators):
    assert doctest.testmod(model_search).failed == 0
