"""The ranking of genotypes by a finished search: inside its supernet, compared with networks of the genotype alone, and
by its alpha.
"""
import numpy as np
import paddle
import pytest

import genotypes
import reader
import report
import runs
import supernet_ranking
from agreement import scrambled
from engine import checkpoint, custom_ops
from genotypes import DARTS_SPACE, Genotype, SearchSpace
from model import NetworkCIFAR
from model_search import Supernet
from reference import supernet as reference
from tiny_runs import tiny_search
from utils import UserError

CLASSES = 5
# Both cells with convolutions and skip_connect only: the pools of a discrete network have no batch normalisation.
WITHOUT_POOLS = Genotype(
    (('sep_conv_3x3', 1), ('skip_connect', 0), ('dil_conv_5x5', 2), ('skip_connect', 1)), (2, 3),
    (('skip_connect', 0), ('sep_conv_5x5', 1), ('skip_connect', 2), ('dil_conv_3x3', 0)), (2, 3))
WITH_POOLS = Genotype(
    (('max_pool_3x3', 0), ('avg_pool_3x3', 1), ('none', 2), ('sep_conv_3x3', 0)), (2, 3),
    (('max_pool_3x3', 1), ('skip_connect', 0), ('avg_pool_3x3', 1), ('sep_conv_3x3', 2)), (2, 3))
SPACE = SearchSpace(DARTS_SPACE.primitives, 2)


def plain_logits(weights, images, genotype, supernet, layers):
    """Returns the logits of a genotype, only its edges, with the weights of a supernet, in Paddle's dynamic mode."""
    space, partial = supernet.space, supernet.partial_channels
    channels = supernet.cells[0].channels
    with paddle.base.dygraph.guard():
        w = {name: paddle.to_tensor(array) for name, array in weights.items()}
        x = reference.batch_norm(paddle.nn.functional.conv2d(paddle.to_tensor(images), w['stem.0.weight'], padding=1))
        s0 = s1 = x * w['stem.1.weight'].reshape([1, -1, 1, 1]) + w['stem.1.bias'].reshape([1, -1, 1, 1])
        for i, _, _, _, reduction, reduction_prev in reference.cells(channels, layers, space.nodes):
            preprocess0 = reference.factorized_reduce if reduction_prev else reference.relu_conv_bn
            states = [preprocess0(s0, w, f'cells.{i}.preprocess0'),
                      reference.relu_conv_bn(s1, w, f'cells.{i}.preprocess1')]
            cell = genotype.reduce if reduction else genotype.normal
            for node in range(space.nodes):
                total = 0
                for name, state in cell[2 * node:2 * node + 2]:
                    edge = [0, 2, 5, 9][node] + state
                    stride, x = 2 if reduction and state < 2 else 1, states[state]
                    operated, rest = x[:, :x.shape[1] // partial], x[:, x.shape[1] // partial:]
                    if stride == 2 and partial > 1:
                        rest = paddle.nn.functional.max_pool2d(rest, 2, 2)
                    prefix = f'cells.{i}._ops.{edge}._ops.{space.primitives.index(name)}'
                    size = operated.shape[2] // stride
                    result = paddle.zeros([x.shape[0], operated.shape[1], size, size], x.dtype) if name == 'none' else \
                        reference.operation(name, operated, w, prefix, stride)
                    if partial > 1:
                        result = reference.shuffle(paddle.concat([result, rest], axis=1), partial) / 2
                    total = total + result
                states.append(total)
            s0, s1 = s1, paddle.concat(states[2:], axis=1)
        features = s1.mean(axis=[2, 3])
        return (paddle.matmul(features, w['classifier.weight'], transpose_y=True) + w['classifier.bias']).numpy()


def loss_and_top1(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), np.ravel(labels)]
    return losses.mean(), (logits.argmax(axis=1) == np.ravel(labels)).mean()


def random_supernet(partial_channels=1, channels=4, layers=4):
    supernet = Supernet(channels, CLASSES, layers, 'float64', image_size=16, space=SPACE,
                        partial_channels=partial_channels)
    rng = np.random.default_rng(0)
    weights = scrambled(supernet.shapes, rng)
    supernet.set_weights(weights)
    return supernet, weights, (rng.normal(size=(6, 3, 16, 16)), rng.integers(0, CLASSES, (6, 1)))


def select(supernet, genotype):
    supernet.set_alphas(supernet_ranking.one_hot(supernet.space, genotype, supernet.partial_channels))


@pytest.mark.parametrize('partial_channels', [1, 2])
def test_a_genotype_in_the_supernet_equals_a_network_of_its_edges_alone(operators, partial_channels):
    supernet, weights, (images, labels) = random_supernet(partial_channels)
    losses = set()
    for genotype in (WITHOUT_POOLS, WITH_POOLS):
        select(supernet, genotype)
        found = supernet.evaluate(images, labels)
        loss, top1 = loss_and_top1(plain_logits(weights, images, genotype, supernet, 4), labels)
        assert found.loss == pytest.approx(loss, abs=1e-9) and found.top1 == pytest.approx(top1)
        losses.add(round(loss, 6))
    assert len(losses) == 2


def test_a_genotype_in_the_supernet_equals_the_discrete_network():
    """Its batch normalisations have scale 1 and shift 0, as in the supernet; in training they use the batch."""
    supernet, weights, (images, labels) = random_supernet()
    select(supernet, WITHOUT_POOLS)
    network = NetworkCIFAR(WITHOUT_POOLS, 4, CLASSES, 4, dtype='float64', image_size=16)
    arrays, copied = {}, 0
    for name, shape in network.shapes.items():
        arrays[name] = np.ones(shape) if name.endswith(('.weight', '_var')) else np.zeros(shape)
        parts = name.split('.')
        if '_ops' in parts:
            cell = WITHOUT_POOLS.reduce if int(parts[1]) in (4 // 3, 2 * 4 // 3) else WITHOUT_POOLS.normal
            operation, state = cell[int(parts[3])]
            edge = (0, 2)[int(parts[3]) // 2] + state
            parts[3:4] = [str(edge), '_ops', str(DARTS_SPACE.primitives.index(operation))]
        if '.'.join(parts) in weights:
            arrays[name], copied = weights['.'.join(parts)], copied + 1
    network.set_weights(arrays)
    assert copied == sum(len(shape) > 1 for shape in network.shapes.values()) + 3            # stem and classifier
    assert supernet.evaluate(images, labels).loss == pytest.approx(network.run(network.feed(images, labels)).loss,
                                                                   abs=1e-9)


def test_mixing_weights_are_zero_and_one():
    supernet = Supernet(4, CLASSES, 3, image_size=8, space=SPACE, partial_channels=2)
    select(supernet, WITH_POOLS)
    weights = {name: array.round(20) for name, array in supernet.mixing_weights().items()}
    names = [[SPACE.primitives[k] for k in table.argmax(axis=1)]
             for table in (weights['alphas_normal'], weights['alphas_reduce'])]
    assert names == [['max_pool_3x3', 'avg_pool_3x3', 'sep_conv_3x3', 'none', 'none'],
                     ['skip_connect', 'max_pool_3x3', 'none', 'avg_pool_3x3', 'sep_conv_3x3']]
    assert set(np.unique(weights['alphas_normal'])) == {0, 1}
    assert weights['betas_normal'].tolist() == [0.5, 0.5, 0.5, 0, 0.5]
    assert weights['betas_reduce'].tolist() == [0.5, 0.5, 0, 0.5, 0.5]


def test_log_alpha_by_hand():
    space = SearchSpace(('none', 'skip_connect', 'sep_conv_3x3'), 1)
    genotype = Genotype((('skip_connect', 1), ('sep_conv_3x3', 0)), (2,), (('none', 0), ('skip_connect', 1)), (2,))
    mixing = {'alphas_normal': [[0.5, 0.25, 0.25], [0.1, 0.4, 0.5]], 'alphas_reduce': [[0.2, 0.3, 0.5], [0.0, 1.0, 0]]}
    expected = np.log(0.4 * 0.25 * 0.2 * 1.0)
    assert supernet_ranking.log_alpha(space, mixing, genotype) == pytest.approx(expected)
    mixing.update(betas_normal=[[0.3, 0.7]], betas_reduce=[[0.6, 0.4]])
    assert supernet_ranking.log_alpha(space, mixing, genotype) == pytest.approx(
        expected + np.log(0.3 * 0.7 * 0.6 * 0.4))
    mixing['alphas_normal'][1][1] = 0.0                                       # rounded to zero: not infinite
    assert np.isfinite(supernet_ranking.log_alpha(space, mixing, genotype))


def test_genotypes_outside_of_the_space():
    edges = WITH_POOLS.normal
    for genotype, reason in ((WITH_POOLS, None), (genotypes.DARTS_V1, 'does not have 2 nodes'),
                             (WITH_POOLS._replace(reduce_concat=(3,)), 'its reduce cell does not have 2 nodes'),
                             (WITH_POOLS._replace(normal=(*edges[:3], ('sep_conv_7x7', 0))), 'lacks sep_conv_7x7'),
                             (WITH_POOLS._replace(normal=(*edges[:3], ('skip_connect', 2))), 'two operations')):
        found = supernet_ranking.why_outside(SPACE, genotype)
        assert found is None if reason is None else reason in found
    assert all(supernet_ranking.why_outside(DARTS_SPACE, genotypes.named()[name]) is None
               for name in ('DARTS_V1', 'DARTS_V2', 'DARTS_PADDLE', 'PC_DARTS_CIFAR', 'PC_DARTS_IMAGENET'))
    large = SearchSpace((*DARTS_SPACE.primitives, 'sep_conv_7x7'), 5)
    assert 'two operations' in supernet_ranking.why_outside(
        large, genotypes.NASNet._replace(reduce_concat=(2, 3, 4, 5, 6)))


def test_a_space_without_none():
    with pytest.raises(UserError, match='needs the primitive none, .* the search space is 2 nodes, skip_connect,'):
        supernet_ranking.check_space(SearchSpace(('skip_connect', 'sep_conv_3x3'), 2))


# ---------------------------------------------------------------------------------------------------
# Finished searches

@pytest.fixture
def data(monkeypatch):
    """Returns the data set of tiny_runs.tiny_search, and makes `reader.load` return it."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (18, 3, 32, 32), 'uint8'), np.arange(18) % 10
    found = reader.Dataset('random', 10, tuple('0123456789'), images, labels, images, labels,
                           np.full(3, 0.5, 'float32'), np.full(3, 0.25, 'float32'))
    monkeypatch.setattr(reader, 'load', lambda *arguments: found)
    return found


@pytest.mark.parametrize('partial_channels', [1, 2])
def test_weights_and_images_are_those_of_the_search(tmp_path, data, compiled, partial_channels):
    tiny_search(tmp_path, init_channels=4, partial_channels=partial_channels, epochs=1, seed=3)
    with custom_ops.disabled():
        finished = supernet_ranking.FinishedSearch(str(tmp_path))
        state = checkpoint.read_checkpoint(str(tmp_path / runs.checkpoint_names(tmp_path)[-1]))[1]
        result = finished.evaluate(genotypes.DARTS_V1)
        assert np.array_equal(finished.supernet.store.get('theta'), state['theta'])
        # With the alpha of the search its validation is repeated.
        before, finished.supernet.set_alphas = finished.supernet.set_alphas, lambda _: None
        finished.supernet.store.set('alphas', state['alphas'])
        line = runs.history(tmp_path)[-1]
        assert finished.evaluate(genotypes.DARTS_V1) == {'loss': line['valid_loss'], 'top1': line['valid_top1']}
        finished.supernet.set_alphas = before
        assert finished.evaluate(genotypes.DARTS_V1) == result != finished.evaluate(genotypes.DARTS_V2)
        # The mean over the batches, 3 images each, of the network of the genotype's edges alone.
        weights = {name: array.astype('float64') for name, array in finished.supernet.weights().items()}
        expected = np.mean([loss_and_top1(plain_logits(weights, images.astype('float64'), genotypes.DARTS_V1,
                                                       finished.supernet, 3), labels)
                            for images, labels in map(lambda step: finished.valid.batch(0, step), range(3))], axis=0)
        assert [result['loss'], result['top1']] == pytest.approx(expected, rel=1e-3)
        fewer = supernet_ranking.FinishedSearch(str(tmp_path), images=4)
        assert [len(fewer.valid.batch(0, step)[1]) for step in range(len(fewer.valid))] == [3, 1]
        assert np.array_equal(fewer.valid.batch(0, 0)[0], finished.valid.batch(0, 0)[0])


def test_folders_that_are_no_finished_search(tmp_path, data):
    with pytest.raises(UserError, match='its last checkpoint is needed, and .*missing has none'):
        supernet_ranking.FinishedSearch(str(tmp_path / 'missing'))
    tiny_search(tmp_path / 'run', epochs=1)
    path = tmp_path / 'run' / runs.checkpoint_names(tmp_path / 'run')[-1]
    metadata, state = checkpoint.read_checkpoint(str(path))
    for changes, arrays, reason in (({'step': 2}, state, 'in the middle of an epoch'),
                                    ({}, dict(state, theta=state['theta'][:-1]), 'does not fit its network'),
                                    ({'settings': dict(metadata['settings'], data_checksum=7)}, state, 'other images')):
        with open(path, 'wb') as file:
            checkpoint.write_arrays(file, {**metadata, **changes}, arrays)
        with custom_ops.disabled(), pytest.raises(UserError, match=reason):
            supernet_ranking.FinishedSearch(str(tmp_path / 'run'))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match='is damaged'):
        supernet_ranking.FinishedSearch(str(tmp_path / 'run'))


# ---------------------------------------------------------------------------------------------------
# Table

def test_the_table_correlates_both_rankings_with_the_trained_accuracy():
    pytest.importorskip('scipy')
    known = {name: genotypes.draw(DARTS_SPACE, seed) for seed, name in enumerate(('a_0', 'random_0', 'random_1', 'b'))}
    top1, losses, supernet_top1 = [80, 82, 85, 90], [1.5, 2.0, 1.0, 0.5], [0.1, 0.3, 0.2, 0.4]
    rows = [dict(group='random' if 'random' in name else 'a', name=name, seed=seed, top1=value + 2 * seed,
                 genotype=genotype._asdict())
            for seed in (0, 1) for (name, genotype), value in zip(known.items(), top1)]
    rows.append(dict(rows[0], name='outside', genotype=genotypes.NASNet._asdict()))
    rng = np.random.default_rng(0)
    mixing = {f'alphas_{kind}': rng.dirichlet(np.ones(8), 14).tolist() for kind in ('normal', 'reduce')}
    searches = [{'name': 'a', 'seed': seed, 'settings': {'space': DARTS_SPACE.as_dict()}, 'mixing': mixing}
                for seed in (0, 1)]
    rankings = [{'name': 'a', 'seed': 0, 'genotype_name': name, 'loss': loss, 'top1': value}
                for name, loss, value in zip(known, losses, supernet_top1)]
    scores = [supernet_ranking.log_alpha(DARTS_SPACE, mixing, genotype) for genotype in known.values()]
    expected = [report.correlate(values, top1, coefficient) for values in
                ([-loss for loss in losses], supernet_top1, scores) for coefficient in ('spearman', 'kendall')]
    lines = supernet_ranking.ranking_table(searches, rows, rankings)
    cells = [f'{value:+.2f} ({p:.2g})' for value, p in expected]
    assert lines[2] == f"| a_0 | all | 4 | {' | '.join(cells)} |"
    assert lines[3] == f"| a_1 | all | 4 |  |  |  |  | {' | '.join(cells[4:])} |"           # no supernet evaluations
    assert lines[4] == f'| mean of a | all | 4 |  |  |  |  | {expected[4][0]:+.2f} | {expected[5][0]:+.2f} |'
    assert len(lines) == 5                                              # two random genotypes are too few
    assert supernet_ranking.ranking_table([dict(searches[0], mixing={})], rows, []) == []
