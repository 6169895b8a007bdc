"""The batched supernet against the plain one that is built edge by edge (plain.py), in float64."""
import doctest

import numpy as np
import pytest

import model_search
from engine import custom_ops
from reference import supernet as plain
from reference import supernet_numpy as plain_numpy
from architect import Architect
from model_search import Supernet
from engine.optimizers import MomentumSGD
from utils import UserError

CLASSES = 5

pytestmark = pytest.mark.usefixtures('operators')


def make(channels, layers, dtype='float64', image_size=8, seed=0):
    """A supernet, with weights and alpha that leave nothing equal, and a batch."""
    rng = np.random.default_rng(seed)
    supernet = Supernet(channels, CLASSES, layers, dtype, image_size=image_size)
    weights = {name: array + rng.normal(0, 0.1, array.shape) for name, array in supernet.weights().items()}
    alphas = {name: rng.normal(0, 1, (14, 8)) for name in supernet.alphas()}
    supernet.set_weights(weights)
    supernet.set_alphas(alphas)
    batch = rng.normal(size=(4, 3, image_size, image_size)), rng.integers(0, CLASSES, (4, 1))
    return supernet, weights, alphas, batch


def agree(supernet, weights, alphas, batch, channels, layers, tolerance=1e-9):
    ours = supernet.gradients(*batch)
    loss, logits, weight_gradients, alpha_gradients = plain.gradients(weights, alphas, *batch, channels, layers)
    assert abs(ours.loss - loss) < tolerance
    assert ours.loss == pytest.approx(supernet.evaluate(*batch).loss, abs=tolerance)
    order = np.argsort(-logits, axis=1)
    assert ours.top1 == pytest.approx(np.mean(order[:, :1] == batch[1]))
    assert ours.top5 == pytest.approx(np.mean((order[:, :5] == batch[1]).any(axis=1)))
    assert set(ours.weights) == set(weight_gradients)
    for name, gradient in weight_gradients.items():
        scale = max(1.0, np.abs(gradient).max())
        assert np.abs(ours.weights[name] - gradient).max() < tolerance * scale, name
    for name, gradient in alpha_gradients.items():
        assert np.abs(ours.alphas[name] - gradient).max() < tolerance * max(1.0, np.abs(gradient).max()), name
    return ours


# 3 layers: a normal cell and two reduction cells; 6: normal cells after normal and after reduction cells.
@pytest.mark.parametrize('channels, layers, image_size', [(2, 3, 8), (4, 3, 16), (2, 6, 8)])
def test_loss_and_all_gradients_equal_the_edge_by_edge_network(channels, layers, image_size):
    supernet, weights, alphas, batch = make(channels, layers, image_size=image_size)
    ours = agree(supernet, weights, alphas, batch, channels, layers)
    assert min(np.abs(gradient).max() for gradient in ours.weights.values()) > 0
    # none (column 0) has a gradient too, through the softmax.
    assert all((np.abs(gradient) > 0).all() for gradient in ours.alphas.values())


@pytest.mark.parametrize('channels, layers', [(2, 3), (4, 6)])
def test_loss_and_accuracy_equal_those_computed_in_numpy(channels, layers):
    supernet, weights, alphas, batch = make(channels, layers, seed=1)
    logits = plain_numpy.numpy_forward(weights, alphas['alphas_normal'], alphas['alphas_reduce'], batch[0],
                                       channels, layers, epsilon=plain.EPSILON)
    evaluation = supernet.evaluate(*batch)
    assert evaluation.loss == pytest.approx(plain_numpy.cross_entropy(logits, batch[1]), abs=1e-10)
    assert evaluation[1:] == pytest.approx(plain_numpy.accuracies(logits, batch[1]))


def test_permuted_edges_and_operations():
    """What an edge and an operation are called is what is computed there: moved weights still agree."""
    supernet, weights, alphas, batch = make(2, 3)
    before = supernet.gradients(*batch).loss
    rng = np.random.default_rng(5)
    order = rng.permutation(14)
    moved = dict(weights)
    for name in weights:
        parts = name.split('.')
        if name.startswith('cells.0._ops.'):                         # in cell 0 all operations have stride 1
            moved[name] = weights['.'.join(parts[:3] + [str(order[int(parts[3])])] + parts[4:])]
    shuffled = {'alphas_normal': alphas['alphas_normal'][order][:, rng.permutation(8)],
                'alphas_reduce': alphas['alphas_reduce'][rng.permutation(14)]}
    supernet.set_weights(moved)
    supernet.set_alphas(shuffled)
    after = agree(supernet, moved, shuffled, batch, 2, 3).loss
    assert abs(after - before) > 1e-3


def test_float32_agrees_within_its_precision():
    supernet, weights, alphas, batch = make(4, 3, dtype='float32', image_size=16)
    loss = plain.gradients(weights, alphas, *batch, 4, 3)[0]
    assert supernet.gradients(*batch).loss == pytest.approx(loss, rel=1e-5)


def test_names_and_shapes_are_those_of_the_authors():
    for channels, classes, layers in ((2, 5, 3), (4, 10, 5), (2, 7, 8)):
        shapes = Supernet(channels, classes, layers, image_size=8).layout.shapes
        assert shapes == plain.weight_shapes(channels, classes, layers)


def test_the_size_of_the_default_supernet():
    assert sum(int(np.prod(shape)) for shape in plain.weight_shapes(16, 10, 8).values()) == 1930618
    supernet = Supernet()
    assert supernet.size == 1930618
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
    Architect(supernet, optimizer)
    assert supernet.store.operators <= (1000 if custom_ops.enabled() else 4500)


def test_weights_and_alpha_are_read_back_as_they_were_set():
    supernet, weights, alphas, _ = make(2, 3)
    for name, array in supernet.weights().items():
        np.testing.assert_array_equal(array, weights[name])
    for name, array in supernet.alphas().items():
        np.testing.assert_array_equal(array, alphas[name])
    supernet.set_weights({'classifier.bias': np.arange(5.0)})        # one alone leaves the others
    np.testing.assert_array_equal(supernet.weights()['classifier.bias'], np.arange(5.0))
    np.testing.assert_array_equal(supernet.weights()['stem.0.weight'], weights['stem.0.weight'])


def test_initial_values():
    supernet = Supernet(16, 10, 3, seed=1)
    for name, array in supernet.weights().items():
        if name == 'stem.1.weight':
            assert (array == 1).all()
        elif name == 'stem.1.bias':
            assert (array == 0).all()
        else:
            fan_in = np.prod(array.shape[1:]) if array.ndim > 1 else supernet.weights()['classifier.weight'].shape[1]
            assert np.abs(array).max() <= fan_in ** -0.5
            assert array.size < 100 or np.std(array) == pytest.approx((3 * fan_in) ** -0.5, rel=0.2)
    alphas = np.stack(list(supernet.alphas().values()))
    assert np.std(alphas) == pytest.approx(1e-3, rel=0.2) and np.abs(np.mean(alphas)) < 3e-4
    same, other = Supernet(16, 10, 3, seed=1), Supernet(16, 10, 3, seed=2)
    assert same.store.get('theta').tobytes() == supernet.store.get('theta').tobytes()
    assert other.store.get('theta').tobytes() != supernet.store.get('theta').tobytes()


def test_warming_up_changes_nothing():
    supernet, _, _, batch = make(2, 3, dtype='float32')
    architect = Architect(supernet)
    architect.step(batch, batch, 0.1)
    names = ('theta', 'velocity', 'alphas', 'adam_mean', 'adam_variance')
    before = {name: supernet.store.get(name).tobytes() for name in names}
    supernet.store.warm_up()
    assert before == {name: supernet.store.get(name).tobytes() for name in names}


@pytest.mark.parametrize('arguments, reason', [
    (dict(layers=2), 'layers is 2'), (dict(channels=5), 'init_channels is 5'), (dict(channels=0), 'init_channels is 0'),
    (dict(image_size=30), '30 x 30')])
def test_sizes_that_cannot_be_built(arguments, reason):
    with pytest.raises(UserError, match=reason):
        Supernet(**arguments)


def test_weights_that_do_not_fit_are_named():
    supernet, _, _, _ = make(2, 3)
    with pytest.raises(UserError, match="unknown weight 'stem.9.weight'"):
        supernet.set_weights({'stem.9.weight': np.zeros(3)})
    with pytest.raises(UserError, match=r'stem.1.bias has shape \[3\], expected \[6\]'):
        supernet.set_weights({'stem.1.bias': np.zeros(3)})
    with pytest.raises(UserError, match='unknown alpha'):
        supernet.set_alphas({'alphas': np.zeros((14, 8))})
    with pytest.raises(UserError, match=r'alphas_normal has shape \[14, 7\]'):
        supernet.set_alphas({'alphas_normal': np.zeros((14, 7))})


def test_the_example_in_the_docstring():
    assert doctest.testmod(model_search).failed == 0
