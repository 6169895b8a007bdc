"""Other search spaces from end to end: a new operation, other primitives and nodes, other mixing weights, errors."""
import json

import numpy as np
import paddle
import pytest

import convert_weights
import genotypes
import make_sample
import model_search
import operations
import reader
from engine import checkpoint, custom_ops
from genotypes import DARTS_SPACE, SearchSpace
from model_search import Supernet
from operations import BatchNorm, Operation, conv
from runs import assert_equal_runs, assert_one_line, checkpoint_names, history, output_of, run_in_process
from tiny_runs import Crash, tiny_search
from utils import UserError

SPACE = SearchSpace(('none', 'skip_connect', 'conv_1x1', 'sep_conv_3x3'), 3)
DATA = ('--dataset', 'fashion_mnist_sample', '--use_gpu', 'False', '--batch_size', '4', '--layers', '3')
SEARCH = ('train_search.py', *DATA, '--init_channels', '2', '--epochs', '1',
          '--unrolled', 'False', '--primitives', ','.join(SPACE.primitives), '--nodes', '3')


class Conv1x1:
    """ReLU, 1x1 convolution, BN, on `States`, as in CONTRIBUTING.md."""

    def __init__(self, layout, prefixes, channels, stride, affine):
        self.edges, self.stride = len(prefixes), stride
        self.weight = layout.declare([f'{p}.op.1.weight' for p in prefixes], [channels, channels, 1, 1])
        self.norm = BatchNorm(layout, [f'{p}.op.2' for p in prefixes], channels, affine)

    def __call__(self, states, scale=None):
        x = conv(states.rectified, self.weight, self.stride, groups=self.edges)      # [N, edges * C, H', W']
        return self.norm(x, scale)


class PlainConv1x1(Conv1x1):
    """1x1 convolution without ReLU and BN."""

    def __init__(self, layout, prefixes, channels, stride, affine):
        self.edges, self.stride = len(prefixes), stride
        self.weight = layout.declare([f'{p}.weight' for p in prefixes], [channels, channels, 1, 1])

    def __call__(self, states):
        return conv(states.repeated, self.weight, self.stride, groups=self.edges)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A new operation is one entry in the table."""
    monkeypatch.setitem(operations.OPERATIONS, 'conv_1x1', Operation(Conv1x1))
    monkeypatch.setitem(operations.OPERATIONS, 'plain_1x1', Operation(PlainConv1x1, ends_in_norm=False))


@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    """Returns a folder with a sample of Fashion-MNIST that is searched, trained and tested in seconds."""
    folder = str(tmp_path_factory.mktemp('sample'))
    make_sample.make(reader.default_folder('fashion_mnist_sample'), folder, train=4, test=2)      # of each class
    return folder


# ---------------------------------------------------------------------------------------------------
# A new operation from end to end

@pytest.mark.parametrize('operators', [pytest.param(True, id='custom_ops'),
                                       pytest.param(False, id='paddle_ops', marks=pytest.mark.slow)], indirect=True)
def test_a_new_operation_is_searched_derived_trained_drawn_and_converted(tmp_path, operators, monkeypatch, sample):
    flags = ('--custom_ops', str(custom_ops.enabled()), '--data', sample)
    run = tmp_path / 'search'
    output = output_of(*SEARCH, *flags, '--model_save_dir', run)
    assert 'search space: 3 nodes, none,skip_connect,conv_1x1,sep_conv_3x3\n' in output
    assert output.count('conv_1x1: not among the compiled operators') == custom_ops.enabled()
    assert '(1.3863 undecided, 0 decided)' in output
    assert json.loads((run / 'args.json').read_text())['primitives'] == list(SPACE.primitives)
    metadata, state = checkpoint.read_checkpoint(str(run / checkpoint_names(run)[-1]))
    assert [metadata['settings'][name] for name in ('primitives', 'nodes')] == [list(SPACE.primitives), 3]
    assert state['alphas'].shape == (2 * 9 * 4,)
    line, = history(run)
    assert line['space'] == SPACE.as_dict() and np.shape(line['alphas_reduce']) == (9, 4)
    assert genotypes.load(str(run / 'genotype.json'), operations.OPERATIONS) == genotypes.check(line['genotype'])

    # The weights of the supernet, with an alpha in which the new operation wins on every edge.
    supernet = Supernet(2, 10, 3, space=SPACE, build_programs=False)
    supernet.store.set('theta', state['theta'])
    alphas = {name: np.eye(4)[[2] * 9] + np.linspace(0, 0.1, 9)[:, None] * np.eye(4)[2] for name in supernet.alphas()}
    weights = {**supernet.weights(), **alphas}
    with open(tmp_path / 'supernet.npz', 'wb') as file:
        checkpoint.write_arrays(file, {'space': SPACE.as_dict()}, weights)
    output_of(*SEARCH, *flags, '--model_save_dir', tmp_path / 'again', '--pretrained', tmp_path / 'supernet.npz',
              '--arch_learning_rate', '0')
    genotype = genotypes.load(str(tmp_path / 'again' / 'genotype.json'))
    edges = (('conv_1x1', 1), ('conv_1x1', 0), ('conv_1x1', 2), ('conv_1x1', 1), ('conv_1x1', 3), ('conv_1x1', 2))
    assert genotype == genotypes.Genotype(edges, (2, 3, 4), edges, (2, 3, 4))

    # A cell of the new operation and one of standard operations, which the compiled operator computes if it is on.
    (tmp_path / 'genotype.json').write_text(genotypes.dumps(genotype._replace(
        normal=(('sep_conv_3x3', 0), ('none', 1)) * 3)))
    output_of('train.py', *DATA, *flags, '--arch', tmp_path / 'genotype.json', '--init_channels', '2', '--auxiliary',
              'False', '--epochs', '1', '--model_save_dir', tmp_path / 'train')
    metadata, trained = checkpoint.read_weights(str(tmp_path / 'train' / 'last.npz'))
    assert trained['cells.1._ops.0.op.1.weight'].shape == (4, 4, 1, 1)
    assert metadata['genotype'] == json.loads((tmp_path / 'genotype.json').read_text())
    assert 'top-1' in output_of('train.py', *DATA, *flags, '--arch', tmp_path / 'genotype.json', '--init_channels', '2',
                                '--eval_only', '--pretrained', tmp_path / 'train' / 'last.npz')
    monkeypatch.chdir(tmp_path)
    assert output_of('visualize.py', 'genotype.json', 'search/history.jsonl').count('wrote') == 3
    if custom_ops.enabled():
        check_conversions(tmp_path, weights, trained)


def check_conversions(folder, weights, trained):
    """The weights of the supernet and of the network go to PyTorch's format and back."""
    pytest.importorskip('torch')
    for name, flags, expected in (('supernet.npz', ('--supernet',), weights),
                                  ('train/last.npz', ('--arch', folder / 'genotype.json'), trained)):
        output_of('scripts/convert_weights.py', *flags, folder / name, folder / 'x.pt')
        back = (*flags, '--primitives', ','.join(SPACE.primitives), '--nodes', '3') if 'supernet' in name else flags
        output_of('scripts/convert_weights.py', *back, folder / 'x.pt', folder / 'back.npz')
        metadata, converted = checkpoint.read_weights(str(folder / 'back.npz'))
        assert set(converted) == set(expected)
        assert all(np.array_equal(array, expected[name].astype('float32')) for name, array in converted.items())
        assert metadata.get('space') == (SPACE.as_dict() if 'supernet' in name else None)
    # Without the flags the file would have to be of the default space.
    output_of('scripts/convert_weights.py', '--supernet', folder / 'supernet.npz', folder / 'x.pt')
    assert_one_line(run_in_process('scripts/convert_weights.py', '--supernet', folder / 'x.pt', folder / 'y.npz'),
                    f'does not fit a supernet of {DARTS_SPACE}')


def test_a_resumed_search_of_another_space_equals_the_uninterrupted_one(tmp_path):
    space = dict(primitives=['sep_conv_3x3', 'none', 'max_pool_3x3'], nodes=2)
    tiny_search(tmp_path / 'uninterrupted', **space)
    with pytest.raises(Crash):
        tiny_search(tmp_path / 'resumed', crash_after=4, **space)
    tiny_search(tmp_path / 'resumed', resume=True, **space)
    assert_equal_runs(tmp_path / 'resumed', tmp_path / 'uninterrupted')


@pytest.mark.parametrize('partial', [1, 2])
def test_gradients_of_an_operation_without_a_normalisation(partial):
    """Against numeric differentiation: the supernet multiplies the result by the mixing weights."""
    space = SearchSpace(('plain_1x1', 'skip_connect', 'none'), 2)
    supernet = Supernet(2, 3, 3, 'float64', image_size=8, space=space, partial_channels=partial)
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 3, (4, 1))
    supernet.store.set('alphas', rng.normal(size=supernet.store.get('alphas').shape))
    supernet.gradients(*batch)
    for vector, gradient, entries in (('alphas', 'alpha_gradient', 12), ('theta', 'gradient', 40)):
        values, found = supernet.store.get(vector), supernet.store.get(gradient).ravel()
        for k in rng.choice(values.size, entries, replace=False):
            losses = []
            for step in (-1e-6, 1e-6):
                changed = values.copy()
                changed.flat[k] += step
                supernet.store.set(vector, changed)
                losses.append(supernet.evaluate(*batch).loss)
            assert (losses[1] - losses[0]) / 2e-6 == pytest.approx(found[k], abs=1e-7)
        supernet.store.set(vector, values)
    assert np.abs(supernet.gradients(*batch).weights['cells.1._ops.0._ops.0.weight']).max() > 1e-4


def test_the_result_of_an_operation_without_a_normalisation_is_multiplied_by_its_mixing_weight():
    """The convolution is linear: other mixing weights with inversely scaled kernels give the same network."""
    supernet = Supernet(2, 3, 3, 'float64', image_size=8, space=SearchSpace(('plain_1x1', 'none'), 2))
    rng, losses = np.random.default_rng(0), []
    batch, kernels = (rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 3, (4, 1))), supernet.weights()
    for _ in range(2):
        supernet.store.set('alphas', rng.normal(size=(2, 5, 2)))
        scaled = dict(kernels)
        for number, cell in enumerate(supernet.cells):
            weights = supernet.mixing_weights()[f"alphas_{'reduce' if cell.reduction else 'normal'}"]
            for edge in range(5):
                name = f'cells.{number}._ops.{edge}._ops.0.weight'
                scaled[name] = kernels[name] / weights[edge, 0]
        supernet.set_weights(scaled)
        losses.append(supernet.evaluate(*batch).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    supernet.store.set('alphas', rng.normal(size=(2, 5, 2)))
    assert abs(supernet.evaluate(*batch).loss - losses[1]) > 1e-4


# ---------------------------------------------------------------------------------------------------
# Other mixing weights

def test_program_derivation_and_log_use_one_function(monkeypatch, operators):
    """A sigmoid in the one place: the network is that of a softmax with the same weights, where none takes the rest."""
    space = SearchSpace(('skip_connect', 'sep_conv_3x3', 'max_pool_3x3', 'none'), 2)
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 3, (4, 1))
    logits = rng.normal(-2, 0.3, (2, space.edges, 4))

    def build():
        supernet = Supernet(2, 3, 3, 'float64', image_size=8, space=space)
        supernet.store.set('alphas', logits)
        return supernet
    softmax = build()
    monkeypatch.setattr(model_search, 'mixing_weights', paddle.nn.functional.sigmoid)
    sigmoid = build()
    expected = 1 / (1 + np.exp(-logits))
    assert np.allclose(list(sigmoid.mixing_weights().values()), expected, atol=1e-12)
    assert sigmoid.genotype() == genotypes.derive(space, *expected)
    rest = 1 - expected[..., :3].sum(axis=-1, keepdims=True)
    softmax.store.set('alphas', np.log(np.concatenate([expected[..., :3], rest], axis=-1)))
    assert sigmoid.gradients(*batch).loss == pytest.approx(softmax.gradients(*batch).loss, abs=1e-9)
    assert abs(sigmoid.evaluate(*batch).loss - build_loss(logits, softmax, batch)) > 1e-3


def build_loss(logits, supernet, batch):
    supernet.store.set('alphas', logits)
    return supernet.evaluate(*batch).loss


# ---------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize('flags, reasons', [
    (('--primitives', 'none,conv_9x9'), ("unknown operation 'conv_9x9'", 'none, max_pool_3x3', 'sep_conv_7x7')),
    (('--primitives', 'none'), ('at least one operation other than none',)),
    (('--primitives', ''), ("unknown operation ''",)),
    (('--primitives', 'skip_connect, none,skip_connect'), ('skip_connect occurs more than once',)),
    (('--nodes', '0'), ("'0' has to be a whole number from 1",)),
    (('--nodes', '2', '--stop_at_skips', '5'), ('a cell of 2 nodes has 4 edges',))])
def test_wrong_spaces_end_in_one_line(flags, reasons):
    assert_one_line(run_in_process('train_search.py', *flags), *reasons)


def test_another_space_is_refused_with_both(tmp_path):
    tiny_search(tmp_path / 'run', epochs=1, primitives=['none', 'skip_connect'], nodes=2)
    for changes, reasons in ((dict(nodes=3), ('nodes 2 there, 3 now',)),
                             (dict(primitives=['skip_connect', 'none']),
                              ('primitives none,skip_connect there, skip_connect,none now',))):
        settings = {**dict(epochs=1, primitives=['none', 'skip_connect'], nodes=2), **changes}
        with pytest.raises(UserError) as error:
            tiny_search(tmp_path / 'run', resume=True, **settings)
        assert all(reason in str(error.value) for reason in reasons)
    with open(tmp_path / 'supernet.npz', 'wb') as file:
        checkpoint.write_arrays(file, {'space': SPACE.as_dict()}, {})
    assert_one_line(run_in_process('train_search.py', '--pretrained', tmp_path / 'supernet.npz'),
                    f'{SPACE} there, {DARTS_SPACE} now')
    with pytest.raises(UserError, match='3 nodes, .* there, 4 nodes, none,skip_connect,conv_1x1,sep_conv_3x3 now'):
        convert_weights.convert(str(tmp_path / 'supernet.npz'), str(tmp_path / 'x.pt'), None, {'nodes': 4})
