"""The discrete networks against the reference (tests/reference/discrete.py), in float64, and figures by hand."""
import math
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import model
import utils
from agreement import assert_all_close, assert_close, scrambled, statistics_of
from genotypes import Genotype, named
from model import AUXILIARY, NetworkCIFAR, NetworkImageNet
from reference import discrete as reference
from train import Training
from utils import UserError

CLASSES, BATCH = 8, 5
with_both_operator_sets = pytest.mark.usefixtures('operators')


def cell_pair(nodes, normal, reduce):
    """Returns a Genotype; normal, reduce: 'operation state' of the edges."""
    both = [tuple(zip(text.split()[::2], map(int, text.split()[1::2]))) for text in (normal, reduce)]
    concat = tuple(range(2, 2 + nodes))
    return Genotype(both[0], concat, both[1], concat)


# Edges of none, with both strides, alone on a node and next to another edge; other numbers of nodes.
OTHER_CELLS = {
    '1 node': cell_pair(1, 'sep_conv_3x3 0 none 1', 'none 0 skip_connect 1'),
    '3 nodes': cell_pair(3, 'none 0 none 1 dil_conv_3x3 0 none 2 none 2 skip_connect 0',
                     'none 0 max_pool_3x3 1 none 1 none 2 sep_conv_3x3 3 none 0'),
    '5 nodes': cell_pair(5, ('skip_connect 0 sep_conv_3x3 1 ' * 4 + 'dil_conv_3x3 5 avg_pool_3x3 2').strip(),
                     'max_pool_3x3 0 skip_connect 1 ' * 4 + 'none 5 dil_conv_5x5 2')}


def make(kind, arch, channels, layers, image_size, batch=BATCH, **settings):
    """Returns a network with random weights and running statistics, the weights by name, and a random batch."""
    rng = np.random.default_rng(0)
    network = kind({**named(), **OTHER_CELLS}[arch], channels, CLASSES, layers, dtype='float64',
                   image_size=image_size, **settings)
    weights = scrambled(network.shapes, rng)
    network.set_weights(weights)
    return network, weights, (rng.normal(size=(batch, 3, image_size, image_size)), rng.integers(0, CLASSES, batch))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


# 3 layers: a normal and two reduction cells; 5: normal cells after reduction cells too; 2: reduction cells only.
# Paddle computes smoothed labels in single precision: 0.125 with 8 classes is exact there.
@with_both_operator_sets
@pytest.mark.parametrize('kind, arch, channels, layers, image_size, auxiliary, smoothing', [
    (NetworkCIFAR, 'DARTS_PADDLE', 4, 5, 8, 0, 0), (NetworkCIFAR, 'DARTS_PADDLE', 2, 1, 8, 0, 0),
    (NetworkCIFAR, '1 node', 2, 3, 8, 0, 0), (NetworkCIFAR, '3 nodes', 2, 4, 8, 0, 0),
    (NetworkCIFAR, '5 nodes', 2, 4, 8, 0, 0),
    (NetworkCIFAR, 'DARTS_V1', 2, 3, 8, 0, 0), (NetworkCIFAR, 'DARTS_V2', 2, 2, 12, 0, 0),
    (NetworkCIFAR, 'NASNet', 2, 3, 8, 0, 0), (NetworkCIFAR, 'AmoebaNet', 2, 3, 8, 0, 0),
    (NetworkImageNet, 'DARTS_PADDLE', 4, 4, 64, 0, 0), (NetworkImageNet, 'NASNet', 2, 3, 64, 0, 0),
    (NetworkImageNet, 'AmoebaNet', 2, 3, 32, 0, 0), (NetworkCIFAR, 'DARTS_PADDLE', 2, 3, 32, 0.4, 0),
    *((NetworkCIFAR, 'DARTS_V1', 2, layers, size, 0.4, 0) for size, layers in (
        (28, 2), (8, 2), (12, 2), (16, 2), (24, 2), (48, 2), (32, 1))),
    (NetworkImageNet, 'DARTS_PADDLE', 2, 3, 224, 0.4, 0.125)])
def test_a_network_equals_the_reference(kind, arch, channels, layers, image_size, auxiliary, smoothing):
    """Names, evaluation, loss, gradients and running statistics."""
    batch = 2 if image_size == 224 else BATCH
    network, weights, (images, labels) = make(kind, arch, channels, layers, image_size, batch, auxiliary=auxiliary,
                                              label_smooth=smoothing)
    imagenet, genotype = kind is NetworkImageNet, {**named(), **OTHER_CELLS}[arch]
    shapes = reference.weight_shapes(genotype, channels, CLASSES, layers, imagenet, bool(auxiliary))
    assert network.shapes == shapes
    assert set(network.layout.shapes) == {name for name in shapes if not name.endswith(reference.STATISTICS)}

    expected = reference.evaluate(weights, genotype, images, layers, imagenet)
    assert_close(network.logits(images), expected.logits)
    assert network.multiply_adds == expected.multiply_adds
    result = network.evaluate(images, labels)
    order = np.argsort(-expected.logits, axis=1)
    assert_close(result.loss, -log_softmax(expected.logits)[range(batch), labels].mean())
    assert result.top1 == pytest.approx(np.mean(order[:, 0] == labels))
    assert result.top5 == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    assert_all_close(network.weights(), weights)                    # unchanged by the evaluation

    expected = reference.train(weights, genotype, images, labels, layers, imagenet, auxiliary, smoothing)
    result = network.run(network.feed(images, labels))
    assert_close(result.loss, expected.loss)
    assert result.top1 == pytest.approx(np.mean(expected.logits.argmax(axis=1) == labels))
    gradients = network.layout.named(network.store.get('gradient'))
    assert_all_close(gradients, expected.gradients)
    assert arch in OTHER_CELLS or min(np.abs(gradient).max() for gradient in gradients.values()) > 1e-6
    assert_all_close(network.weights(), dict(weights, **expected.statistics))
    assert set(expected.statistics) == set(statistics_of(weights))


@pytest.mark.parametrize('kind, arguments, size, param_count', [
    (NetworkCIFAR, (36, 10, 20), 4243728, 3767302), (NetworkImageNet, (48, 1000, 14), 6496680, 5235904)])
def test_sizes_of_the_default_networks(kind, arguments, size, param_count):
    genotype = named()['DARTS_PADDLE']
    network = kind(genotype, *arguments, auxiliary=0.4, build_programs=False)
    assert (network.size, network.param_count) == (size, param_count)
    assert network.shapes == reference.weight_shapes(genotype, *arguments, kind is NetworkImageNet, auxiliary=True)
    network = kind(genotype, *arguments, auxiliary=0.4, with_training=False, build_programs=False)
    assert network.size == network.param_count == param_count


def test_initial_values():
    """Convolutions and classifiers are uniform in +-1 / sqrt(fan_in), drawn from the seed; a new BN is the identity."""
    def network(seed):
        return NetworkCIFAR(named()['AmoebaNet'], 16, 100, 3, auxiliary=0.4, seed=seed, build_programs=False)
    first, weights = network(1), network(1).weights()
    for name, array in weights.items():
        if name.endswith('classifier.bias') or array.ndim > 1:
            matrix = weights[name.replace('.bias', '.weight')]
            bound = math.prod(matrix.shape[1:]) ** -0.5
            assert np.abs(array).max() <= bound * (1 + 1e-6), name
            assert np.abs(array).max() > 0.9 * bound and np.abs(array.mean()) < 3 * bound / array.size ** 0.5, name
        else:
            assert (array == (1 if name.endswith(('.weight', '.running_var')) else 0)).all(), name
    assert first.store.get('theta').tobytes() != network(2).store.get('theta').tobytes()
    assert_all_close(first.weights(), weights)


@with_both_operator_sets
@pytest.mark.parametrize('arch, dropped', [('DARTS_V1', 5 + 2 * 5), ('DARTS_PADDLE', 7 + 2 * 5)])
def test_every_edge_except_identities_is_multiplied_by_its_own_mask(monkeypatch, arch, dropped):
    rng = np.random.default_rng(4)
    edges = reference.droppable_edges(named()[arch], layers=3)
    assert len(edges) == dropped
    kept = (rng.uniform(size=(dropped, BATCH)) < 0.6).astype('float64')
    counts = []

    def given_masks(count, number, keep):
        counts.append(number)
        return paddle.assign(kept.T.reshape(BATCH, number, 1, 1).astype('float32')).astype('float64') / keep
    monkeypatch.setattr(model, 'drop_path_masks', given_masks)
    network, weights, (images, labels) = make(NetworkCIFAR, arch, 2, 3, 8, use_drop_path=True)
    assert counts == [dropped]
    expected = reference.train(weights, named()[arch], images, labels, 3, masks=dict(zip(edges, kept / 0.75)))
    assert_close(network.run(network.feed(images, labels), drop_path_prob=0.25).loss, expected.loss)
    assert_all_close(network.layout.named(network.store.get('gradient')), expected.gradients)
    assert_all_close(network.weights(), dict(weights, **expected.statistics))


@with_both_operator_sets
def test_drop_path_depends_on_seed_and_probability_and_is_off_in_the_evaluation():
    network, weights, (images, labels) = make(NetworkCIFAR, 'DARTS_V2', 2, 3, 8, use_drop_path=True)
    feed = network.feed(images, labels)
    complete = reference.train(weights, named()['DARTS_V2'], images, labels, 3).loss
    assert_close(network.run(feed).loss, complete)
    first, again, other = (network.run(feed, 0.5, seed).loss for seed in (1, 1, 2))
    assert first == again and len({first, other, complete}) == 3
    assert_close(network.logits(images), reference.evaluate(network.weights(), named()['DARTS_V2'], images, 3).logits)


def test_multiply_adds_by_hand():
    """A network of one reduction cell: images of 8 x 8, channels 2 -> 4, output 4 x 4."""
    edges = ('sep_conv_5x5', 0), ('dil_conv_3x3', 1), ('conv_7x1_1x7', 0), ('skip_connect', 1)
    network = NetworkCIFAR(Genotype(edges, (2, 3), edges, (2, 3)), 2, CLASSES, 1, image_size=8, with_training=False)
    stem, preprocesses, classifier = 64 * 6 * 3 * 9, 2 * 64 * 6 * 4, 8 * CLASSES
    sep_conv, dil_conv = 16 * 2 * (4 * 25 + 4 * 4), 16 * (4 * 9 + 4 * 4)
    rows_and_columns = 32 * 4 * 4 * 7 + 16 * 4 * 4 * 7             # 1 x 7 halves the width only
    factorized_reduce = 16 * 2 * (2 * 4)
    assert network.multiply_adds == (stem + preprocesses + sep_conv + dil_conv + rows_and_columns
                                     + factorized_reduce + classifier)


def test_label_smoothing_by_hand():
    """-sum(target * log softmax), target 0.9 + 0.1 / 8 at the label and 0.1 / 8 elsewhere; off in the evaluation."""
    network, weights, (images, labels) = make(NetworkCIFAR, 'DARTS_V2', 2, 2, 8, label_smooth=0.1)
    log_likelihood = log_softmax(reference.train(weights, named()['DARTS_V2'], images, labels, 2).logits)
    targets = np.full((BATCH, CLASSES), 0.1 / 8)
    targets[range(BATCH), labels] += 0.9
    assert network.run(network.feed(images, labels)).loss == pytest.approx(
        -(targets * log_likelihood).sum(axis=1).mean(), rel=1e-7)
    assert network.evaluate(images, labels).loss == pytest.approx(
        -log_softmax(network.logits(images))[range(BATCH), labels].mean(), rel=1e-12)


def test_schedules_by_hand():
    assert [utils.cosine(epoch, 600, 0.025) for epoch in (0, 200, 300, 400, 600)] == pytest.approx(
        [0.025, 0.01875, 0.0125, 0.00625, 0.0])
    assert [utils.cosine(epoch, 50, 0.025, 0.001) for epoch in (0, 25, 50)] == pytest.approx([0.025, 0.013, 0.001])
    assert [utils.exponential(epoch, 0.1, 0.97) for epoch in (0, 1, 3)] == pytest.approx([0.1, 0.097, 0.0912673])
    task = SimpleNamespace(args=SimpleNamespace(drop_path_prob=0.2, epochs=600))
    assert [Training.drop_path_prob(task, epoch) for epoch in (0, 150, 300, 600)] == pytest.approx([0, 0.05, 0.1, 0.2])


@pytest.mark.parametrize('kind, channels, layers, settings, reason', [
    (NetworkCIFAR, 5, 3, {}, 'init_channels is 5, but has to be even and positive'),
    (NetworkCIFAR, 0, 3, {}, 'init_channels is 0, but has to be even and positive'),
    (NetworkCIFAR, 2, 3, dict(image_size=30), '30 x 30 cannot be halved .* multiple of 4'),
    (NetworkImageNet, 2, 3, dict(image_size=48), '48 x 48 cannot be halved .* multiple of 32'),
    (NetworkCIFAR, 2, 3, dict(auxiliary=0.4, image_size=4), 'images of 4 x 4 are too small for the auxiliary head'),
    (NetworkImageNet, 2, 3, dict(auxiliary=0.4, image_size=32), 'images of 32 x 32 are too small')])
def test_sizes_that_cannot_be_built(kind, channels, layers, settings, reason):
    with pytest.raises(UserError, match=reason):
        kind(named()['DARTS_PADDLE'], channels, CLASSES, layers, **settings)


def test_weights_are_loaded_with_and_without_an_auxiliary_head():
    network, headless = (NetworkCIFAR(named()['DARTS_PADDLE'], 2, CLASSES, 3, auxiliary=0.4, dtype='float64',
                                      with_training=training, build_programs=False) for training in (True, False))
    initial, weights = network.weights(), scrambled(network.shapes, np.random.default_rng(6))
    without_head = {name: array for name, array in weights.items() if not name.startswith(AUXILIARY)}
    network.load_weights(without_head)
    assert_all_close(network.weights(), {**initial, **without_head})
    network.load_weights(weights)
    assert_all_close(network.weights(), weights)
    headless.load_weights(weights)
    assert_all_close(headless.weights(), without_head)
