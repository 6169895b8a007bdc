"""Weights from and for PyTorch: what they compute there and here, and files that do not fit.

What needs torch is skipped without it; the checks of names and shapes do not.
"""
import os
import pickle
import re
import sys
import zipfile

import numpy as np
import pytest

import convert_weights
import genotypes
from engine import checkpoint
from architect import Architect
from convert_weights import convert
from model import NetworkCIFAR, NetworkImageNet, network_of
from model_search import Supernet
from engine.optimizers import MomentumSGD
from runs import assert_one_line, run, run_well
from utils import UserError

COUNTER = '.num_batches_tracked'


@pytest.fixture
def torch():
    torch = pytest.importorskip('torch', reason='needs torch, for comparison')
    torch.set_num_threads(1)       # the networks are small, and Paddle's threads want the cores too
    return torch


@pytest.fixture
def networks(torch):
    """The module of the PyTorch networks."""
    import reference.pytorch
    return reference.pytorch


def write_npz(path, weights, about=None):
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, about or {}, weights)
    return str(path)


def same(one, other):
    """Whether two {name: array} have the same names, shapes, types and bits."""
    return set(one) == set(other) and all(
        one[name].shape == other[name].shape and one[name].dtype == other[name].dtype
        and one[name].tobytes() == other[name].tobytes() for name in one)


def numpy_of(state_dict):
    return {name: tensor.detach().numpy() for name, tensor in state_dict.items() if not name.endswith(COUNTER)}


def relative(found, expected):
    """The largest difference, as a part of the largest number expected."""
    expected = np.asarray(expected)
    assert np.shape(found) == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------
# Discrete networks, against PyTorch

# (genotype, kind, cells, with auxiliary head)
DISCRETE = [('DARTS_PADDLE', 'CIFAR', 4, True), ('DARTS_PADDLE', 'CIFAR', 3, False), ('NASNet', 'CIFAR', 3, True),
            ('AmoebaNet', 'CIFAR', 4, False), ('DARTS_PADDLE', 'ImageNet', 3, True), ('NASNet', 'ImageNet', 3, False),
            ('AmoebaNet', 'ImageNet', 3, True)]
CHANNELS, CLASSES = 4, 7
SIZE = {'CIFAR': 32, 'ImageNet': 64}          # of images; an auxiliary head of ImageNet needs 224, but not in eval()
EXACT = 1e-5


def peer(networks, torch, arch, kind, cells, auxiliary):
    """A PyTorch network in eval() whose BN have scales, shifts and statistics of all sizes."""
    torch.manual_seed(1)
    network = getattr(networks, f'Network{kind}')(genotypes.GENOTYPES[arch], CHANNELS, CLASSES, cells, auxiliary)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        size = 224 if kind == 'ImageNet' and auxiliary else SIZE[kind]
        for _ in range(3):
            network.train()(torch.randn(4, 3, size, size))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean += 0.1 * torch.randn(module.num_features)
                module.running_var *= 0.5 + torch.rand(module.num_features)
    return network.eval()


def images_for(kind, count=3):
    return np.random.default_rng(0).normal(size=(count, 3, SIZE[kind], SIZE[kind])).astype('float32')


def logits_of(torch, network, images):
    with torch.no_grad():
        return network(torch.from_numpy(images))[0].numpy()


def load(path, arch, kind, **settings):
    """The network here that an .npz describes, for evaluation."""
    about, weights = checkpoint.read_weights(str(path))
    assert genotypes.check(about['genotype']) == genotypes.GENOTYPES[arch]
    network = network_of(genotypes.GENOTYPES[arch], weights, with_training=False, image_size=SIZE[kind], **settings)
    assert type(network) is {'CIFAR': NetworkCIFAR, 'ImageNet': NetworkImageNet}[kind]
    return network


@pytest.mark.parametrize('arch, kind, cells, auxiliary', DISCRETE)
def test_a_network_of_pytorch_gives_the_same_logits_here(tmp_path, networks, torch, arch, kind, cells, auxiliary):
    theirs = peer(networks, torch, arch, kind, cells, auxiliary)
    source, target = str(tmp_path / 'source.pt'), str(tmp_path / 'target.npz')
    torch.save(theirs.state_dict(), source)
    convert(source, target, arch, False)
    assert same(checkpoint.read_weights(target)[1], numpy_of(theirs.state_dict()))
    network, images = load(target, arch, kind), images_for(kind)
    assert (network.classes, len(network.cells)) == (CLASSES, cells)
    expected = logits_of(torch, theirs, images)
    assert np.ptp(expected, axis=0).max() > 1e-3                   # the images are told apart
    assert relative(network.logits(images), expected) < EXACT

    # And back: the same file but for the counters.
    back = str(tmp_path / 'back.pt')
    convert(target, back, arch, False)
    state_dict = torch.load(back, weights_only=True)
    assert set(state_dict) == set(theirs.state_dict())
    assert same(numpy_of(state_dict), numpy_of(theirs.state_dict()))


@pytest.mark.parametrize('arch, kind, cells, auxiliary', DISCRETE)
def test_a_network_of_here_gives_the_same_logits_in_pytorch(tmp_path, networks, torch, arch, kind, cells, auxiliary):
    genotype, rng = genotypes.GENOTYPES[arch], np.random.default_rng(2)
    make = {'CIFAR': NetworkCIFAR, 'ImageNet': NetworkImageNet}[kind]
    names = make(genotype, CHANNELS, CLASSES, cells, auxiliary=float(auxiliary), build_programs=False)
    weights = scrambled(names.weights(), rng)
    source, target = write_npz(tmp_path / 'source.npz', weights), str(tmp_path / 'target.pt')
    convert(source, target, arch, False)
    theirs = getattr(networks, f'Network{kind}')(genotype, CHANNELS, CLASSES, cells, auxiliary)
    theirs.load_state_dict(torch.load(target, weights_only=True), strict=True)
    ours = network_of(genotype, weights, with_training=False, image_size=SIZE[kind])
    images = images_for(kind)
    assert relative(logits_of(torch, theirs.eval(), images), ours.logits(images)) < EXACT

    back = str(tmp_path / 'back.npz')
    convert(target, back, arch, False)
    assert same(checkpoint.read_weights(back)[1], weights)


def scrambled(weights, rng):
    """The weights with BN as after some training."""
    scrambled = {}
    for name, array in weights.items():
        if name.endswith('.running_var') or array.ndim == 1 and name.endswith('.weight'):
            array = rng.uniform(0.5, 1.5, array.shape)
        elif array.ndim == 1:
            array = rng.normal(0, 0.3, array.shape)
        scrambled[name] = np.asarray(array, 'float32')
    return scrambled


@pytest.mark.parametrize('arch', ['DARTS_PADDLE', 'AmoebaNet'])
def test_the_auxiliary_head_too_computes_the_same(tmp_path, networks, torch, arch):
    """The loss of a training batch, which is that of both classifiers."""
    theirs = peer(networks, torch, arch, 'CIFAR', 3, True)
    source, target = str(tmp_path / 'source.pt'), str(tmp_path / 'target.npz')
    torch.save(theirs.state_dict(), source)
    convert(source, target, arch, False)
    network = network_of(genotypes.GENOTYPES[arch], checkpoint.read_weights(target)[1])
    images, labels = images_for('CIFAR', 6), np.arange(6) % CLASSES
    both = theirs.train()(torch.from_numpy(images))
    losses = [torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item() for logits in both]
    expected = losses[0] + network.auxiliary * losses[1]
    assert network.run(network.feed(images, labels)).loss == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize('wrap', [
    lambda state_dict: {f'module.{name}': tensor for name, tensor in state_dict.items()},
    lambda state_dict: {'epoch': 3, 'state_dict': state_dict, 'best_acc_top1': 74.9},
    lambda state_dict: {'state_dict': {f'module.{name}': tensor for name, tensor in state_dict.items()}},
    lambda state_dict: {name: tensor for name, tensor in state_dict.items() if not name.endswith(COUNTER)},
    lambda state_dict: dict(reversed(state_dict.items())),
], ids=['data parallel', 'checkpoint', 'checkpoint of data parallel', 'before there were counters', 'other order'])
def test_the_forms_in_which_state_dicts_are_published(tmp_path, networks, torch, wrap):
    theirs = peer(networks, torch, 'DARTS_PADDLE', 'CIFAR', 3, True)
    source, target = str(tmp_path / 'source.pt'), str(tmp_path / 'target.npz')
    torch.save(wrap(theirs.state_dict()), source)
    convert(source, target, 'DARTS_PADDLE', False)
    assert same(checkpoint.read_weights(target)[1], numpy_of(theirs.state_dict()))
    images = images_for('CIFAR')
    found = load(target, 'DARTS_PADDLE', 'CIFAR').logits(images)
    assert relative(found, logits_of(torch, theirs, images)) < EXACT


def test_other_types_of_tensors(tmp_path, networks, torch):
    """Parameters with gradients, double and half precision, views: all of them numbers."""
    theirs = peer(networks, torch, 'DARTS_PADDLE', 'CIFAR', 3, False)
    expected = numpy_of(theirs.state_dict())
    state_dict = dict(theirs.state_dict())
    state_dict['classifier.weight'] = torch.nn.Parameter(state_dict['classifier.weight'])
    state_dict['classifier.bias'] = state_dict['classifier.bias'].double()
    state_dict['stem.1.bias'] = state_dict['stem.1.bias'].bfloat16()
    expected['stem.1.bias'] = state_dict['stem.1.bias'].float().numpy()
    state_dict['stem.0.weight'] = state_dict['stem.0.weight'].contiguous(memory_format=torch.channels_last)
    source, target = str(tmp_path / 'source.pt'), str(tmp_path / 'target.npz')
    torch.save(state_dict, source)
    convert(source, target, 'DARTS_PADDLE', False)
    assert same(checkpoint.read_weights(target)[1], expected)


# ---------------------------------------------------------------------------------------------------
# The supernet, against PyTorch

def batch(rng, dtype, count=6, size=8):
    return rng.normal(size=(count, 3, size, size)).astype(dtype), rng.integers(0, CLASSES, count)


def supernets(networks, torch, tmp_path, layers, dtype):
    """The same supernet in PyTorch and here, its weights through a file, its alpha through another."""
    torch.manual_seed(4)
    theirs = networks.Supernet(CHANNELS, CLASSES, layers)
    with torch.no_grad():
        theirs.stem[1].weight.uniform_(0.5, 1.5)
        theirs.stem[1].bias.normal_(0, 0.3)
        for alphas in theirs.alphas():
            alphas.normal_(0, 0.5)
    weights, everything = (str(tmp_path / name) for name in ('weights.pt', 'everything.pt'))
    torch.save(theirs.state_dict(), weights)
    torch.save(dict(theirs.state_dict(), alphas_normal=theirs.alphas_normal, alphas_reduce=theirs.alphas_reduce),
               everything)
    ours = Supernet(CHANNELS, CLASSES, layers, dtype=dtype, image_size=8)
    target = str(tmp_path / 'supernet.npz')
    for source in (weights, everything):                            # without alpha it keeps its own
        before = ours.alphas()
        convert(source, target, None, True)
        ours.load_weights(checkpoint.read_weights(target)[1])
        changed = not np.array_equal(before['alphas_reduce'], ours.alphas()['alphas_reduce'])
        assert changed == (source == everything)
    return theirs, ours


@pytest.mark.parametrize('layers', [3, 5])
def test_a_supernet_of_pytorch_gives_the_same_loss_and_gradients_here(tmp_path, networks, torch, layers):
    theirs, ours = supernets(networks, torch, tmp_path, layers, 'float32')
    expected = numpy_of(dict(theirs.named_parameters(), alphas_normal=theirs.alphas_normal,
                             alphas_reduce=theirs.alphas_reduce))
    assert same(dict(ours.weights(), **ours.alphas()), expected)
    images, labels = batch(np.random.default_rng(0), 'float32')
    loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
    loss.backward()
    found = ours.gradients(images, labels)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert ours.evaluate(images, labels).loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in found.alphas.items():
        assert relative(gradient, getattr(theirs, name).grad) < 1e-4, name
    for name, parameter in theirs.named_parameters():
        assert relative(found.weights[name], parameter.grad) < 1e-3, name


def search_checkpoint(path, supernet, **changes):
    """A checkpoint as train_search.py writes it, -> its path."""
    store = supernet.store
    state = dict(theta=store.get('theta'), alphas=store.get('alphas'), velocity=np.zeros(supernet.size, 'float32'),
                 adam_mean=np.zeros((2, 14, 8), 'float32'), adam_variance=np.zeros((2, 14, 8), 'float32'),
                 adam_steps=np.array(3))
    settings = {'init_channels': CHANNELS, 'class_num': CLASSES, 'layers': 4, 'batch_size': 64}
    about = {'settings': settings, 'epoch': 1, 'step': 0, 'meter': {}}
    for name, value in changes.items():
        if name in state:
            state[name] = value
        elif value is None:
            del settings[name]
        else:
            settings[name] = value
    return write_npz(path, state, about)


def test_a_checkpoint_of_the_search_for_pytorch_and_back(tmp_path, networks, torch):
    ours = Supernet(CHANNELS, CLASSES, 4, seed=3, image_size=8)
    source, target = search_checkpoint(tmp_path / 'checkpoint.npz', ours), str(tmp_path / 'supernet.pt')
    convert(source, target, None, True)
    state_dict = torch.load(target, weights_only=True)
    theirs = networks.Supernet(CHANNELS, CLASSES, 4)
    with torch.no_grad():
        for name in ours.alphas():
            getattr(theirs, name).copy_(state_dict.pop(name))
    missing, unexpected = theirs.load_state_dict(state_dict, strict=False)
    assert not unexpected
    assert all(name.endswith(convert_weights.STATISTICS + (COUNTER,)) for name in missing)
    images, labels = batch(np.random.default_rng(0), 'float32')
    loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
    assert ours.evaluate(images, labels).loss == pytest.approx(loss.item(), rel=1e-5)

    back = str(tmp_path / 'back.npz')
    convert(target, back, None, True)
    everything = dict(ours.weights(), **ours.alphas())
    assert same(checkpoint.read_weights(back)[1], everything)
    again = str(tmp_path / 'again.pt')
    convert(back, again, None, True)
    assert same(numpy_of(torch.load(again, weights_only=True)), everything)


def double(network, torch):
    """The network in float64, its BN with the epsilon that Paddle has: a float32."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = float(np.float32(1e-5))
    return network.double()


@pytest.mark.parametrize('layers, unrolled', [(3, True), (4, True), (3, False)])
def test_steps_of_the_search_equal_those_of_pytorch(tmp_path, networks, torch, layers, unrolled):
    theirs, ours = supernets(networks, torch, tmp_path, layers, 'float64')
    double(theirs, torch)
    xi, rng = 0.2, np.random.default_rng(5)
    clip = 0.5                                                       # below the gradients' norm: it does clip
    sgd = torch.optim.SGD(theirs.parameters(), xi, momentum=0.9, weight_decay=3e-2)
    their_architect = networks.Architect(theirs, sgd, unrolled=unrolled)
    optimizer = MomentumSGD(ours.store, 0.9, 3e-2, clip)
    our_architect = Architect(ours, optimizer, unrolled=unrolled)
    for step in range(3):
        train, valid = batch(rng, 'float64'), batch(rng, 'float64')
        if step:                                                     # from the very same numbers
            buffers = {name: sgd.state[p]['momentum_buffer'].numpy() for name, p in theirs.named_parameters()}
            ours.store.set('velocity', ours.layout.flat(buffers, ours.store.get('velocity')))
            assert np.linalg.norm(ours.store.get('velocity')) > 0.1
        ours.load_weights(numpy_of(dict(theirs.named_parameters(), **dict(zip(ours.alphas(), theirs.alphas())))))
        their_train, their_valid = ([torch.from_numpy(array) for array in each] for each in (train, valid))

        before = numpy_of(dict(theirs.named_parameters()))
        expected = their_architect.gradient(their_train, their_valid)
        assert all((before[name] == p.detach().numpy()).all() for name, p in theirs.named_parameters())
        our_architect.step(train, valid, xi)
        for found, theirs_d in zip(our_architect.alpha_gradients().values(), expected):
            assert relative(found, theirs_d) < 1e-6

        loss, _ = networks.search_step(theirs, their_architect, sgd, their_train, their_valid, clip)
        for name, alphas in ours.alphas().items():
            assert np.abs(alphas - getattr(theirs, name).detach().numpy()).max() < 1e-8, name
        result = ours.run(ours.feed(*train))
        assert np.linalg.norm(ours.store.get('gradient')) > clip
        optimizer.step(xi)
        assert result.loss == pytest.approx(loss.item(), rel=1e-9)
        weights = ours.weights()
        for name, parameter in theirs.named_parameters():
            assert np.abs(weights[name] - parameter.detach().numpy()).max() < 1e-5, name       # torch clips to 1e-6


# ---------------------------------------------------------------------------------------------------
# The PyTorch networks themselves

def test_names_and_shapes_at_full_size(networks):
    def shapes(network):
        return {name: tuple(array.shape) for name, array in network.state_dict().items() if not name.endswith(COUNTER)}

    theirs = networks.Supernet(16, 10, 8)
    parameters = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert parameters == Supernet(build_programs=False).shapes
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 1930618
    for make, kind, sizes, trained in (
            (networks.NetworkCIFAR, NetworkCIFAR, (36, 10, 20), 4243728),
            (networks.NetworkImageNet, NetworkImageNet, (48, 1000, 14), 6496680)):
        theirs = make(genotypes.DARTS_PADDLE, *sizes, auxiliary=True)
        assert shapes(theirs) == kind(genotypes.DARTS_PADDLE, *sizes, auxiliary=0.4, build_programs=False).shapes
        assert sum(parameter.numel() for parameter in theirs.parameters()) == trained


def test_drop_path_of_the_pytorch_networks(networks, torch):
    torch.manual_seed(0)
    x = torch.rand(2000, 2, 3, 3) + 1
    factors = networks.drop_path(x, 0.25) / x
    assert torch.allclose(factors, factors[:, :1, :1, :1].expand_as(factors))           # a sample as a whole
    dropped = factors[:, 0, 0, 0] == 0
    assert 0.2 < dropped.double().mean() < 0.3
    assert torch.allclose(factors[~dropped], torch.tensor(1 / 0.75))
    network, images = networks.NetworkCIFAR(genotypes.DARTS_V2, 2, 3, 3), torch.randn(4, 3, 16, 16)
    for network.drop_path_prob, mode, differ in ((0.0, True, False), (0.5, True, True), (0.5, False, False)):
        one, other = (network.train(mode)(images)[0] for _ in range(2))
        assert torch.equal(one, other) != differ


# ---------------------------------------------------------------------------------------------------
# Names and shapes, without PyTorch

def small(arch='DARTS_PADDLE', auxiliary=True):
    return NetworkCIFAR(genotypes.GENOTYPES[arch], 2, 3, 3, auxiliary=float(auxiliary), build_programs=False).weights()


def small_supernet():
    supernet = Supernet(2, 3, 3, build_programs=False)
    return dict(supernet.weights(), **supernet.alphas())


def test_a_state_dict_and_what_is_here_differ_by_counters_and_prefixes():
    weights = small()
    state_dict = convert_weights.to_state_dict(weights)
    counters = set(state_dict) - set(weights)
    assert counters == {name[:-len('.running_var')] + COUNTER for name in weights if name.endswith('.running_var')}
    assert all(state_dict[name].shape == () and state_dict[name].dtype == 'int64' for name in counters)
    assert same(convert_weights.from_state_dict(state_dict), weights)
    parallel = {f'module.{name}': array.astype('float64') for name, array in state_dict.items()}
    assert same(convert_weights.from_state_dict(parallel), weights)
    assert not any(name.endswith(COUNTER) for name in convert_weights.to_state_dict(small_supernet()))


def test_the_checks_give_back_all_that_fits():
    for auxiliary in (True, False):
        weights = small(auxiliary=auxiliary)
        assert same(convert_weights.check_discrete(genotypes.DARTS_PADDLE, weights), weights)
    both = small_supernet()
    alone = {name: array for name, array in both.items() if not name.startswith('alphas_')}
    assert same(convert_weights.check_supernet(both), both)
    assert same(convert_weights.check_supernet(alone), alone)


def test_running_statistics_of_a_supernet_are_left_out():
    both, n = small_supernet(), np.ones(2, 'float32')
    more = dict(both, **{'cells.0.preprocess1.op.2.running_mean': n, 'cells.0._ops.0._ops.1.1.running_var': n,
                         'stem.1.running_var': np.ones(6, 'float32'), 'cells.0._ops.0._ops.4.op.3.running_mean': n})
    assert same(convert_weights.check_supernet(more), both)


def test_a_checkpoint_of_the_search_without_pytorch(tmp_path):
    supernet = Supernet(CHANNELS, CLASSES, 4, seed=3, build_programs=False)
    source = search_checkpoint(tmp_path / 'checkpoint.npz', supernet)
    assert same(convert_weights.read_supernet(source), dict(supernet.weights(), **supernet.alphas()))


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    source = write_npz(tmp_path / 'source.npz', small())
    for arguments in ((source, str(tmp_path / 'target.pt')), (str(tmp_path / 'a.pt'), str(tmp_path / 'b.npz'))):
        with pytest.raises(UserError, match='pip install torch'):
            convert(*arguments, 'DARTS_PADDLE', False)


# ---------------------------------------------------------------------------------------------------
# Mistakes

def refused(source, target, arch='DARTS_PADDLE', supernet=False):
    """What is said of a conversion that is refused: one line; nothing is written."""
    with pytest.raises(UserError) as error:
        convert(str(source), str(target), arch, supernet)
    assert not os.path.exists(str(target))
    message = str(error.value)
    assert '\n' not in message and len(message) < 500
    return message


def without(name):
    def change(weights):
        del weights[name]
    return change


def replaced(name, *shape):
    def change(weights):
        weights[name] = np.zeros(shape, 'float32')
    return change


def without_start(start):
    def change(weights):
        for name in [name for name in weights if name.startswith(start)]:
            del weights[name]
    return change


DEPTHWISE = 'cells.1._ops.5.op.1.weight'         # the first cell of reduction, dil_conv_5x5
BAD_DISCRETE = {
    'missing': (without(DEPTHWISE), [DEPTHWISE, 'missing', '1 missing']),
    'missing statistics': (without('cells.0.preprocess0.op.2.running_var'),
                           ['cells.0.preprocess0.op.2.running_var', 'missing']),
    'missing stem': (without('stem.0.weight'), ['stem.0.weight', 'missing']),
    'missing classifier': (without('classifier.weight'), ['classifier.weight', 'missing']),
    'missing bias': (without('classifier.bias'), ['classifier.bias', 'missing']),
    'missing cell': (without_start('cells.1.'), ['missing']),
    'unknown': (replaced('cells.0._ops.0.op.9.weight', 2), ['cells.0._ops.0.op.9.weight', 'unknown']),
    'unknown auxiliary': (replaced('auxiliary_head.other', 2), ['auxiliary_head.other', 'unknown']),
    'shape': (replaced(DEPTHWISE, 4, 1, 3, 3), [DEPTHWISE, '[4, 1, 3, 3]', '[4, 1, 5, 5]']),
    'shape of statistics': (replaced('stem.1.running_mean', 7), ['stem.1.running_mean', '[7]', '[6]']),
    'dimensions': (replaced('stem.0.weight', 6), ['stem.0.weight', '[6]']),
    'empty': (replaced('stem.0.weight', 0, 3, 3, 3), ['stem.0.weight', '[0, 3, 3, 3]']),
    'no dimension': (replaced('classifier.weight'), ['classifier.weight', '[]']),
    'odd channels': (replaced('stem.0.weight', 9, 3, 3, 3), ['3', 'even']),
    'partial auxiliary head': (without('auxiliary_head.features.5.weight'),
                               ['auxiliary_head.features.5.weight', 'missing']),
    'auxiliary classifier alone': (without_start('auxiliary_head.features'), ['auxiliary_head.features', 'missing']),
}
BAD_SUPERNET = {
    'missing': (without('cells.2._ops.13._ops.7.op.2.weight'), ['cells.2._ops.13._ops.7.op.2.weight', '1 missing']),
    'missing stem': (without('stem.0.weight'), ['stem.0.weight', 'missing']),
    'missing classifier': (without('classifier.weight'), ['classifier.weight', 'missing']),
    'unknown': (replaced('cells.0._ops.0._ops.0.weight', 2), ['cells.0._ops.0._ops.0.weight', 'unknown']),
    'shape': (replaced('cells.1.preprocess0.op.1.weight', 4, 6, 1), ['cells.1.preprocess0.op.1.weight', '[4, 6, 1]']),
    'alpha of another space': (replaced('alphas_normal', 14, 7), ['alphas_normal', '[14, 7]', '[14, 8]']),
    'unknown alpha': (replaced('alphas_upsample', 14, 8), ['alphas_upsample']),
    'too few cells': (without_start('cells.2.'), ['layers is 2']),
    'odd channels': (replaced('stem.0.weight', 9, 3, 3, 3), ['3', 'even']),
}


@pytest.mark.parametrize('case', BAD_DISCRETE)
def test_weights_that_do_not_fit_a_genotype(tmp_path, case):
    change, culprits = BAD_DISCRETE[case]
    weights = small()
    change(weights)
    source = write_npz(tmp_path / 'source.npz', weights)
    message = refused(source, tmp_path / 'target.pt')
    assert all(culprit in message for culprit in [source, 'DARTS_PADDLE', *culprits])


@pytest.mark.parametrize('case', BAD_SUPERNET)
def test_weights_that_do_not_fit_a_supernet(tmp_path, case):
    change, culprits = BAD_SUPERNET[case]
    weights = small_supernet()
    change(weights)
    source = write_npz(tmp_path / 'source.npz', weights)
    message = refused(source, tmp_path / 'target.pt', None, True)
    assert all(culprit in message for culprit in [source, 'supernet', *culprits])


@pytest.mark.parametrize('case', BAD_DISCRETE)
def test_state_dicts_that_do_not_fit_a_genotype(tmp_path, torch, case):
    change, culprits = BAD_DISCRETE[case]
    weights = small()
    change(weights)
    source = str(tmp_path / 'source.pt')
    convert_weights.write_state_dict(source, convert_weights.to_state_dict(weights))
    message = refused(source, tmp_path / 'target.npz')
    assert all(culprit in message for culprit in [source, 'DARTS_PADDLE', *culprits])


def test_weights_of_another_genotype(tmp_path):
    source = write_npz(tmp_path / 'source.npz', small())
    for arch in ('NASNet', 'AmoebaNet', 'DARTS_V1', 'DARTS_V2'):
        message = refused(source, tmp_path / 'target.pt', arch)
        assert f'{source} does not fit {arch}: ' in message
    assert 'supernet' in refused(source, tmp_path / 'target.pt', None, True)
    source = write_npz(tmp_path / 'supernet.npz', small_supernet())
    assert 'DARTS_PADDLE' in refused(source, tmp_path / 'target.pt')


def test_names_of_files_and_genotypes(tmp_path):
    source = write_npz(tmp_path / 'source.npz', small())
    message = refused(source, tmp_path / 'target.npz')
    assert source in message and 'target.npz' in message and '.pt' in message
    message = refused(tmp_path / 'source.pt', tmp_path / 'target.pt')
    assert 'source.pt' in message and 'target.pt' in message and '.npz' in message
    for supernet in (False, True):
        assert 'absent.npz' in refused(tmp_path / 'absent.npz', tmp_path / 'target.pt', 'DARTS_PADDLE', supernet)
    message = refused(source, tmp_path / 'target.pt', 'DARTS_V9')
    assert 'DARTS_V9' in message and 'DARTS_V2' in message


def test_an_npz_of_something_else(tmp_path):
    files = {name: str(tmp_path / f'{name}.npz') for name in ('foreign', 'text', 'cut', 'objects')}
    np.savez(files['foreign'], images=np.zeros((2, 3)))
    whole = open(write_npz(tmp_path / 'whole.npz', small()), 'rb').read()
    for name, content in (('text', b'no archive'), ('cut', whole[:len(whole) // 2])):
        with open(files[name], 'wb') as file:
            file.write(content)
    np.savez(files['objects'], about=np.array([{}], dtype=object))
    for path in files.values():
        for supernet in (False, True):
            assert path in refused(path, tmp_path / 'target.pt', 'DARTS_PADDLE', supernet)


def test_a_checkpoint_is_not_the_weights(tmp_path):
    source = search_checkpoint(tmp_path / 'checkpoint.npz', Supernet(CHANNELS, CLASSES, 4, build_programs=False))
    message = refused(source, tmp_path / 'target.pt')
    assert source in message and 'checkpoint' in message and 'best.npz' in message


@pytest.mark.parametrize('change', [
    {'theta': np.zeros(5, 'float32')}, {'alphas': np.zeros((2, 14, 7), 'float32')}, {'layers': None},
    {'init_channels': 'many'}, {'layers': 5}, {'class_num': None}], ids=str)
def test_a_checkpoint_that_is_none_of_a_search(tmp_path, change):
    supernet = Supernet(CHANNELS, CLASSES, 4, build_programs=False)
    source = search_checkpoint(tmp_path / 'checkpoint.npz', supernet, **change)
    assert source in refused(source, tmp_path / 'target.pt', None, True)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_files_that_hold_no_state_dict(tmp_path, torch):
    def saved(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    good = saved('good.pt', {name: torch.from_numpy(array) for name, array in small().items()})
    with open(good, 'rb') as file:
        content = file.read()
    broken = {'cut.pt': content[:len(content) // 2], 'empty.pt': b'', 'text.pt': b'These are no weights.\n',
              'zeros.pt': bytes(1000)}
    for name, part in broken.items():
        with open(tmp_path / name, 'wb') as file:
            file.write(part)
    mark = tmp_path / 'executed'
    with open(tmp_path / 'pickle.pt', 'wb') as file:
        pickle.dump({'stem.0.weight': Evil(mark)}, file)
    sparse = torch.eye(3)
    cases = [(str(tmp_path / name), []) for name in (*broken, 'absent.pt', 'pickle.pt')] + [
        (saved('list.pt', [torch.zeros(3)]), ['list']), (saved('nothing.pt', {}), ['dict']),
        (saved('tensor.pt', torch.zeros(3)), ['Tensor']), (saved('number.pt', 3), ['int']),
        (saved('evil.pt', {'state_dict': Evil(mark)}), ['without executing']),
        (saved('evil_old.pt', Evil(mark)), ['without executing']),
        (saved('module.pt', torch.nn.Linear(2, 2)), ['without executing']),
        (saved('nested.pt', {'model': {'stem.0.weight': torch.zeros(3)}}), ['model', 'dict']),
        (saved('list_inside.pt', {'stem.0.weight': [1.0, 2.0]}), ['stem.0.weight', 'list']),
        (saved('numbered.pt', {0: torch.zeros(3)}), ['0']),
        (saved('complex.pt', {'stem.0.weight': torch.zeros(3, dtype=torch.complex64)}), ['stem.0.weight']),
        (saved('sparse.pt', {'stem.0.weight': sparse.to_sparse()}), ['stem.0.weight'])]
    for source, culprits in cases:
        for supernet in (False, True):
            message = refused(source, tmp_path / 'target.npz', 'DARTS_PADDLE', supernet)
            assert all(culprit in message for culprit in [source, *culprits])
    assert not mark.exists()
    with open(tmp_path / 'pickle.pt', 'rb') as file:       # executed it would have been noticed
        pickle.load(file)
    assert mark.exists()


@pytest.mark.parametrize('kind', ['sparse rows', 'quantized', 'without numbers'])
def test_tensors_that_are_no_plain_arrays(tmp_path, torch, kind):
    tensor = {'sparse rows': lambda: torch.ones(2, 2).to_sparse_csr(),
              'quantized': lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
              'without numbers': lambda: torch.ones(2, 2, device='meta')}[kind]()
    torch.save({'stem.0.weight': tensor}, tmp_path / 'source.pt')
    assert 'source.pt' in refused(tmp_path / 'source.pt', tmp_path / 'target.npz')


def test_an_altered_number_in_a_state_dict_is_noticed(tmp_path, torch):
    """torch reads the file all the same: it does not look at the checksums."""
    weights = {name: torch.from_numpy(array) for name, array in small().items()}
    path = tmp_path / 'source.pt'
    torch.save(weights, path)
    content, number = bytearray(path.read_bytes()), weights['stem.0.weight'].numpy().tobytes()
    content[content.index(number)] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)['stem.0.weight'], weights['stem.0.weight'])
    assert 'the checksum of' in refused(path, tmp_path / 'target.npz')
    # Marked as a folder in the zip's directory a tensor is whatever was in memory.
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        number = next(k for k, member in enumerate(file.infolist()) if member.filename.endswith('data/0'))
    at = [match.start() for match in re.finditer(b'PK\x01\x02', bytes(content))][number]
    content[at + 38] = 0x10                    # external attributes
    path.write_bytes(content)
    assert same(convert_weights.from_state_dict(convert_weights.read_state_dict(str(path))), small())


def test_a_tensor_that_repeats_what_it_stores_cannot_take_all_memory(tmp_path, torch):
    torch.save({'stem.0.weight': torch.ones(1).expand(1 << 40)}, tmp_path / 'source.pt')
    assert 'claim to be larger than the file' in refused(tmp_path / 'source.pt', tmp_path / 'target.npz')


def test_a_name_with_and_without_the_prefix():
    """Which of the two weights is meant nobody knows."""
    weights = small()
    weights['module.classifier.bias'] = weights['classifier.bias'] + 1
    with pytest.raises(UserError, match='classifier.bias'):
        convert_weights.from_state_dict(weights)


def test_alpha_of_one_kind_of_cell_alone(tmp_path):
    """The other is not made up."""
    weights = small_supernet()
    del weights['alphas_reduce']
    source = write_npz(tmp_path / 'source.npz', weights)
    assert 'alphas_reduce' in refused(source, tmp_path / 'target.pt', None, True)


@pytest.mark.parametrize('supernet', [False, True])
def test_an_npz_of_text(tmp_path, supernet):
    weights = small_supernet() if supernet else small()
    weights['classifier.bias'] = np.array(['zero', 'one', 'two'])
    source = write_npz(tmp_path / 'source.npz', weights)
    assert 'classifier.bias' in refused(source, tmp_path / 'target.pt', 'DARTS_PADDLE', supernet)


def test_weights_that_say_they_belong_to_another_genotype(tmp_path):
    """The shapes fit, the states do not."""
    source = write_npz(tmp_path / 'source.npz', small(), {'genotype': genotypes.DARTS_PADDLE._asdict()})
    first, *others = genotypes.DARTS_PADDLE.normal
    other = genotypes.DARTS_PADDLE._replace(normal=((first[0], 1 - first[1]), *others))
    (tmp_path / 'other.json').write_text(genotypes.dumps(other))
    assert 'another genotype' in refused(source, tmp_path / 'target.pt', str(tmp_path / 'other.json'))


def test_numbers_beyond_single_precision(tmp_path, torch):
    state_dict = {name: torch.from_numpy(array).double() for name, array in small().items()}
    state_dict['classifier.bias'][0] = 1e300
    torch.save(state_dict, tmp_path / 'source.pt')
    assert 'classifier.bias' in refused(tmp_path / 'source.pt', tmp_path / 'target.npz')


def test_a_checkpoint_that_claims_a_supernet_larger_than_itself(tmp_path):
    supernet = Supernet(CHANNELS, CLASSES, 4, build_programs=False)
    path = search_checkpoint(tmp_path / 'checkpoint.npz', supernet)
    about, arrays = checkpoint.read_arrays(path)
    for key in ('init_channels', 'class_num', 'layers'):
        changed = dict(about, settings=dict(about['settings'], **{key: 10 ** 7}))
        source = write_npz(tmp_path / f'{key}.npz', arrays, changed)
        assert 'larger supernet' in refused(source, tmp_path / 'target.pt', None, True)


# ---------------------------------------------------------------------------------------------------
# The command line

SCRIPT = 'scripts/convert_weights.py'


def test_the_command_line_both_ways(tmp_path, torch):
    weights = small()
    source = write_npz(tmp_path / 'source.npz', weights)
    total = sum(array.size for array in weights.values())
    files = [source, tmp_path / 'middle.pt', tmp_path / 'target.npz']
    for one, other in zip(files, files[1:]):
        output = run_well(SCRIPT, '--arch', 'DARTS_PADDLE', one, other)
        assert output == f'{other}: {len(weights)} entries, {total:,} numbers\n'
    about, found = checkpoint.read_weights(str(files[-1]))
    assert same(found, weights) and genotypes.check(about['genotype']) == genotypes.DARTS_PADDLE


def test_the_command_line_for_a_supernet(tmp_path, torch):
    supernet = Supernet(CHANNELS, CLASSES, 4, build_programs=False)
    source = search_checkpoint(tmp_path / 'checkpoint.npz', supernet)
    files = [source, tmp_path / 'middle.pt', tmp_path / 'target.npz']
    for one, other in zip(files, files[1:]):
        run_well(SCRIPT, '--supernet', one, other)
    assert same(checkpoint.read_weights(str(files[-1]))[1], dict(supernet.weights(), **supernet.alphas()))


@pytest.mark.parametrize('flags, culprit', [
    (['--arch', 'DARTS_PADDLE', 'absent.npz', 'target.pt'], 'absent.npz'),
    (['--arch', 'DARTS_V9', 'source.npz', 'target.pt'], 'DARTS_V9'),
    (['--arch', 'NASNet', 'source.npz', 'target.pt'], 'NASNet'),
    (['--supernet', 'source.npz', 'target.pt'], 'source.npz'),
    (['--arch', 'DARTS_PADDLE', 'source.npz', 'target.npz'], 'target.npz'),
    (['source.npz', 'target.pt'], '--arch'),
    (['--arch', 'DARTS_PADDLE', '--supernet', 'source.npz', 'target.pt'], '--supernet'),
    (['--arch', 'DARTS_PADDLE', 'source.npz'], 'target')])
def test_a_mistake_on_the_command_line(tmp_path, flags, culprit):
    write_npz(tmp_path / 'source.npz', small())
    assert_one_line(run(SCRIPT, *[tmp_path / flag if flag.endswith(('.npz', '.pt')) else flag for flag in flags]),
                    culprit)
    assert not (tmp_path / 'target.pt').exists() and not (tmp_path / 'target.npz').exists()


@pytest.mark.parametrize('target', ['no_folder/target.npz', 'no_folder/target.pt'])
def test_a_target_that_cannot_be_written(tmp_path, torch, target):
    source = write_npz(tmp_path / 'source.npz', small())
    if target.endswith('.npz'):
        source, before = str(tmp_path / 'source.pt'), source
        convert(before, source, 'DARTS_PADDLE', False)
    assert_one_line(run(SCRIPT, '--arch', 'DARTS_PADDLE', source, tmp_path / target), target)
