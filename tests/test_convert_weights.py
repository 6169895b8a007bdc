"""Conversion of weights from and to PyTorch: same bits, same results of both networks, files that do not fit."""
import pickle
import re
import sys
import zipfile

import numpy as np
import pytest

import convert_weights
import genotypes
from convert_weights import COUNTER, STATISTICS, convert
from engine import checkpoint
from model import NetworkCIFAR, NetworkImageNet, network_of
from model_search import Supernet
from runs import assert_one_line, run, run_in_process
from utils import UserError

SCRIPT = 'scripts/convert_weights.py'
CHANNELS, CLASSES = 4, 7
SIZE = {'CIFAR': 32, 'ImageNet': 64}          # of images; only the auxiliary head of ImageNet needs 224
SUPERNET = Supernet(CHANNELS, CLASSES, 3, seed=3, build_programs=False)


@pytest.fixture(scope='module')
def torch():
    torch = pytest.importorskip('torch', reason='needs torch')
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def networks(torch):
    """The module of the PyTorch networks."""
    from reference import pytorch
    return pytorch


def discrete_weights(auxiliary=True):
    return NetworkCIFAR(genotypes.DARTS_PADDLE, 2, 3, 3, auxiliary=float(auxiliary), build_programs=False).weights()


def supernet_weights():
    return dict(SUPERNET.weights(), **SUPERNET.alphas())


def write_npz(path, weights, metadata=None):
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, metadata or {}, weights)
    return str(path)


def write_search_checkpoint(path, **changes):
    """Writes a checkpoint as of train_search.py with changed vectors or settings (None: removed); returns its path."""
    state = {**SUPERNET.store.state(), 'velocity': np.zeros(SUPERNET.size, 'float32'), 'adam_steps': np.array(3)}
    settings = {'init_channels': CHANNELS, 'class_num': CLASSES, 'layers': 3, 'batch_size': 64,
                **SUPERNET.space.as_dict()}
    for name, value in changes.items():
        (state if name in state else settings)[name] = value
    settings = {name: value for name, value in settings.items() if value is not None}
    return write_npz(path, state, {'settings': settings, 'epoch': 1, 'step': 0, 'meter': {}})


def assert_same(found, expected):
    """Asserts that two {name: array} have the same names, shapes, types and bits."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].tobytes() == array.tobytes(), name


def converted(source, arch='DARTS_PADDLE'):
    """Returns the weights {name: array} that a .pt is converted to."""
    target = source.with_suffix('.npz')
    convert(str(source), str(target), arch)
    return checkpoint.read_weights(str(target))[1]


def trained_network(networks, torch, arch, kind, cells, auxiliary):
    """A PyTorch network in eval() whose batch normalisations have scales, shifts and statistics of all sizes."""
    torch.manual_seed(1)
    network = getattr(networks, f'Network{kind}')(genotypes.named()[arch], CHANNELS, CLASSES, cells, auxiliary)
    with torch.no_grad():
        for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            for array, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.3, 0.3),
                                     (norm.running_var, 0.3, 2.0)):
                array.uniform_(low, high)
    return network.eval()


@pytest.mark.parametrize('arch, kind, cells, auxiliary', [
    ('DARTS_PADDLE', 'CIFAR', 4, True), ('DARTS_PADDLE', 'CIFAR', 3, False), ('NASNet', 'CIFAR', 3, True),
    ('AmoebaNet', 'CIFAR', 4, False), ('DARTS_PADDLE', 'ImageNet', 3, True), ('NASNet', 'ImageNet', 3, False),
    ('AmoebaNet', 'ImageNet', 3, True)])
def test_a_discrete_network_gives_the_logits_of_pytorch(tmp_path, networks, torch, arch, kind, cells, auxiliary):
    """The way back restores the state dict, so the logits of PyTorch are those of the .npz as well."""
    torch_network = trained_network(networks, torch, arch, kind, cells, auxiliary)
    source, target, back = (str(tmp_path / name) for name in ('source.pt', 'target.npz', 'back.pt'))
    torch.save(torch_network.state_dict(), source)
    convert(source, target, arch)
    metadata, weights = checkpoint.read_weights(target)
    assert genotypes.check(metadata['genotype']) == genotypes.named()[arch]
    assert_same(weights, networks.arrays_of(torch_network.state_dict()))
    network = network_of(genotypes.named()[arch], weights, with_training=False, image_size=SIZE[kind])
    assert type(network) is {'CIFAR': NetworkCIFAR, 'ImageNet': NetworkImageNet}[kind]
    assert (network.classes, len(network.cells)) == (CLASSES, cells)
    images = np.random.default_rng(0).normal(size=(3, 3, SIZE[kind], SIZE[kind])).astype('float32')
    with torch.no_grad():
        expected = torch_network(torch.from_numpy(images))[0].numpy()
    assert np.ptp(expected, axis=0).max() > 1e-3                   # logits differ between the images
    assert np.abs(network.logits(images) - expected).max() < 1e-5 * np.abs(expected).max()

    convert(target, back, arch)
    state_dict, expected = torch.load(back, weights_only=True), torch_network.state_dict()
    assert_same(networks.arrays_of(state_dict), weights)
    counters = [name for name in expected if name.endswith(COUNTER)]
    assert set(state_dict) == set(expected) and counters
    assert all(torch.equal(state_dict[name], expected[name]) for name in counters)


@pytest.mark.parametrize('arch', ['DARTS_PADDLE', 'AmoebaNet'])
def test_the_loss_of_both_classifiers_is_that_of_pytorch(networks, torch, arch):
    torch_network = trained_network(networks, torch, arch, 'CIFAR', 3, True)
    network = network_of(genotypes.named()[arch], networks.arrays_of(torch_network.state_dict()))
    images, labels = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype('float32'), np.arange(6) % CLASSES
    main, auxiliary = (torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
                       for logits in torch_network.train()(torch.from_numpy(images)))
    expected = main + network.auxiliary * auxiliary
    assert network.run(network.feed(images, labels)).loss == pytest.approx(expected, rel=1e-5)


def tensors_of(torch, weights):
    return {name: torch.from_numpy(np.array(array)) for name, array in convert_weights.to_state_dict(weights).items()}


@pytest.mark.parametrize('wrap', [
    lambda state_dict: {f'module.{name}': tensor for name, tensor in state_dict.items()},
    lambda state_dict: {'epoch': 3, 'state_dict': state_dict, 'best_acc_top1': 74.9},
    lambda state_dict: {'state_dict': {f'module.{name}': tensor for name, tensor in state_dict.items()}},
    lambda state_dict: {name: tensor for name, tensor in state_dict.items() if not name.endswith(COUNTER)},
    lambda state_dict: dict(reversed(state_dict.items())),
], ids=['data parallel', 'checkpoint', 'checkpoint of data parallel', 'without counters', 'other order'])
def test_forms_of_published_state_dicts(tmp_path, torch, wrap):
    torch.save(wrap(tensors_of(torch, discrete_weights())), tmp_path / 'source.pt')
    assert_same(converted(tmp_path / 'source.pt'), discrete_weights())


def test_other_types_of_tensors(tmp_path, torch):
    """Parameters with gradients, double and half precision, other strides."""
    expected = discrete_weights()
    state_dict = tensors_of(torch, expected)
    state_dict['classifier.weight'] = torch.nn.Parameter(state_dict['classifier.weight'])
    state_dict['classifier.bias'] = state_dict['classifier.bias'].double()
    state_dict['stem.1.bias'] = (state_dict['stem.1.bias'] + 1 / 3).bfloat16()
    expected['stem.1.bias'] = state_dict['stem.1.bias'].float().numpy()
    state_dict['stem.0.weight'] = state_dict['stem.0.weight'].contiguous(memory_format=torch.channels_last)
    torch.save(state_dict, tmp_path / 'source.pt')
    assert_same(converted(tmp_path / 'source.pt'), expected)


def test_a_checkpoint_of_the_search_becomes_a_state_dict_and_an_npz(tmp_path, networks, torch):
    """On the command line, whose output is compared too."""
    source = write_search_checkpoint(tmp_path / 'checkpoint.npz')
    files, expected = [source, *(str(tmp_path / name) for name in ('a.pt', 'b.npz', 'c.pt'))], supernet_weights()
    total = sum(array.size for array in expected.values())
    for number, target in enumerate(files[1:]):
        done = run_in_process(SCRIPT, '--supernet', files[number], target)
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout == f'{target}: {len(expected)} entries, {total:,} numbers\n'
    assert_same(checkpoint.read_weights(files[2])[1], expected)
    state_dict = torch.load(files[3], weights_only=True)
    assert_same(networks.arrays_of(state_dict), expected)
    supernet = networks.Supernet(CHANNELS, CLASSES, 3)
    missing, unexpected = supernet.load_state_dict(state_dict, strict=False)
    assert set(unexpected) == {'alphas_normal', 'alphas_reduce'}
    assert all(name.endswith((*STATISTICS, COUNTER)) for name in missing)
    # The state dict of PyTorch's supernet has running statistics and no alphas; those of the target stay unchanged.
    torch.save(supernet.state_dict(), files[1])
    convert(files[1], files[2], None)
    weights, target = checkpoint.read_weights(files[2])[1], Supernet(CHANNELS, CLASSES, 3, build_programs=False)
    assert_same(weights, SUPERNET.weights())
    alphas = target.alphas()
    target.load_weights(weights)
    assert_same({**target.weights(), **target.alphas()}, {**weights, **alphas})


def test_without_torch_the_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    source = write_npz(tmp_path / 'source.npz', discrete_weights())
    for arguments in ((source, str(tmp_path / 'target.pt')), (str(tmp_path / 'a.pt'), str(tmp_path / 'b.npz'))):
        with pytest.raises(UserError, match='pip install torch'):
            convert(*arguments, 'DARTS_PADDLE')


def assert_refused(source, target, arch, *reasons):
    """Asserts that a conversion ends in a one-line UserError with the reasons, and writes nothing."""
    with pytest.raises(UserError) as error:
        convert(str(source), str(target), arch)
    message = str(error.value)
    assert '\n' not in message and len(message) < 500 and not target.exists()
    assert all(reason in message for reason in reasons), message


def removed(start):
    """A change of {name: array}: removes the names that start with a text."""
    return lambda weights: {name: array for name, array in weights.items() if not name.startswith(start)}


def replaced(name, *shape):
    return lambda weights: {**weights, name: np.zeros(shape, 'float32')}


DEPTHWISE = 'cells.1._ops.5.op.1.weight'         # dil_conv_5x5 of the first reduction cell
UNFIT = {
    'DARTS_PADDLE': [
        *((removed(name), name, 'missing') for name in (
            'cells.0.preprocess0.op.2.running_var', 'stem.0.weight', 'classifier.weight', 'classifier.bias',
            'auxiliary_head.features.5.weight', 'auxiliary_head.features')),
        (removed('cells.1.'), 'missing'), (removed(DEPTHWISE), DEPTHWISE, '(1 missing in all)'),
        (replaced('cells.0._ops.0.op.9.weight', 2), 'cells.0._ops.0.op.9.weight', 'unknown'),
        (replaced('auxiliary_head.other', 2), 'auxiliary_head.other', 'unknown'),
        (replaced(DEPTHWISE, 4, 1, 3, 3), DEPTHWISE, '[4, 1, 3, 3]', '[4, 1, 5, 5]'),
        (replaced('stem.1.running_mean', 7), 'stem.1.running_mean', '[7]', '[6]'),
        (replaced('stem.0.weight', 6), 'stem.0.weight', '[6]'),
        (replaced('stem.0.weight', 0, 3, 3, 3), 'stem.0.weight', '[0, 3, 3, 3]'),
        (replaced('stem.0.weight', 9, 3, 3, 3), '3', 'even'),
        (replaced('classifier.weight'), 'classifier.weight', '[]'),
        (lambda weights: {**weights, 'classifier.bias': np.array(['zero', 'one', 'two'])}, 'classifier.bias')],
    None: [
        *((removed(name), name, 'missing') for name in ('stem.0.weight', 'classifier.weight', 'alphas_reduce')),
        (removed('cells.2._ops.13._ops.7.op.2.weight'), 'cells.2._ops.13._ops.7.op.2.weight', '(1 missing in all)'),
        (removed('cells.2.'), 'layers is 2'),
        (replaced('cells.0._ops.0._ops.0.weight', 2), 'cells.0._ops.0._ops.0.weight', 'unknown'),
        (replaced('cells.1.preprocess0.op.1.weight', 4, 6, 1), 'cells.1.preprocess0.op.1.weight', '[4, 6, 1]'),
        (replaced('alphas_normal', 14, 7), 'alphas_normal', '[14, 7]', '[14, 8]'),
        (replaced('alphas_upsample', 14, 8), 'alphas_upsample'),
        (lambda weights: {**weights, 'classifier.bias': np.array(['text'] * CLASSES)}, 'classifier.bias')]}


@pytest.mark.parametrize('arch', UNFIT)
def test_weights_that_do_not_fit(tmp_path, arch):
    fitting = discrete_weights() if arch else supernet_weights()
    network = arch or f'a supernet of {genotypes.DARTS_SPACE}'
    for change, *reasons in UNFIT[arch]:
        source = write_npz(tmp_path / 'source.npz', change(fitting))
        assert_refused(source, tmp_path / 'target.pt', arch, f'{source} does not fit {network}: ', *reasons)


def test_state_dicts_that_do_not_fit(tmp_path, torch):
    source, target, fitting = tmp_path / 'source.pt', tmp_path / 'target.npz', discrete_weights()
    for change, *reasons in [
            (lambda weights: {**weights, 'classifier.bias': np.full(3, 1e300)}, 'classifier.bias'),
            (lambda weights: {**weights, 'module.classifier.bias': weights['classifier.bias'] + 1}, 'occurs twice'),
            *UNFIT['DARTS_PADDLE'][:-1]]:                   # all but text
        torch.save(tensors_of(torch, change(fitting)), source)
        assert_refused(source, target, 'DARTS_PADDLE', f'{source} does not fit DARTS_PADDLE: ', *reasons)


def test_weights_of_another_genotype(tmp_path):
    source, target = write_npz(tmp_path / 'source.npz', discrete_weights()), tmp_path / 'target.pt'
    for arch in ('NASNet', 'AmoebaNet', 'DARTS_V1', 'DARTS_V2'):
        assert_refused(source, target, arch, f'{source} does not fit {arch}: ')
    assert_refused(source, target, None, 'supernet')
    assert_refused(write_npz(tmp_path / 'supernet.npz', supernet_weights()), target, 'DARTS_PADDLE', 'DARTS_PADDLE')
    # A genotype of the same shapes, with another input state.
    first, *others = genotypes.DARTS_PADDLE.normal
    other = genotypes.DARTS_PADDLE._replace(normal=((first[0], 1 - first[1]), *others))
    (tmp_path / 'other.json').write_text(genotypes.dumps(other))
    source = write_npz(source, discrete_weights(), {'genotype': genotypes.DARTS_PADDLE._asdict()})
    assert_refused(source, target, str(tmp_path / 'other.json'), 'trained with DARTS_PADDLE, not with')


def test_an_npz_that_holds_no_weights(tmp_path):
    files = {name: tmp_path / f'{name}.npz' for name in ('foreign', 'text', 'cut', 'objects', 'absent')}
    np.savez(files['foreign'], images=np.zeros((2, 3)))
    np.savez(files['objects'], **{checkpoint.METADATA: np.array([{}], dtype=object)})
    files['text'].write_bytes(b'no archive')
    write_npz(files['cut'], discrete_weights())
    files['cut'].write_bytes(files['cut'].read_bytes()[:-1000])
    for path in files.values():
        for arch in ('DARTS_PADDLE', None):
            assert_refused(path, tmp_path / 'target.pt', arch, str(path))


def test_weights_of_a_shape_without_numbers_reserve_no_memory(tmp_path):
    weights = {**supernet_weights(), 'stem.0.weight': np.zeros((3 * 10 ** 6, 0, 3, 3), 'float32')}
    assert_refused(write_npz(tmp_path / 'source.npz', weights), tmp_path / 'target.pt', None, 'more than the')


def test_checkpoints_of_other_runs(tmp_path):
    source, target = write_search_checkpoint(tmp_path / 'checkpoint.npz'), tmp_path / 'target.pt'
    space, partial_channels, weights = convert_weights.read_supernet(source)
    assert (space, partial_channels) == (genotypes.DARTS_SPACE, 1)
    assert_same(weights, supernet_weights())
    assert_refused(source, target, 'DARTS_PADDLE', source, 'checkpoint', 'best.npz')
    for change, reason in (
            ({'theta': np.zeros(5, 'float32')}, ''), ({'alphas': np.zeros((2, 14, 7), 'float32')}, '[2, 14, 7]'),
            ({'layers': None}, 'layers'), ({'class_num': None}, 'class_num'), ({'init_channels': 'many'}, ''),
            ({'layers': 4}, 'more than the'), ({'nodes': 3}, '[224]'), ({'nodes': 10 ** 15}, '[224]'),
            ({'primitives': ['none']}, 'none'), ({'primitives': None}, 'primitives'),
            ({'primitives': [*genotypes.DARTS_SPACE.primitives[:-1], 'conv_9x9']}, 'conv_9x9'),
            ({'layers': 10 ** 7}, 'larger supernet'),
            ({'init_channels': 10 ** 7}, 'larger supernet'), ({'class_num': 10 ** 7}, 'larger supernet')):
        write_search_checkpoint(source, **change)
        assert_refused(source, target, None, f'{source} is not a checkpoint of a search: ', reason)


@pytest.mark.filterwarnings('ignore::UserWarning')              # PyTorch's, of kinds of tensors in beta or deprecated
def test_a_pt_that_holds_no_state_dict(tmp_path, torch):
    target, executed, tensor = tmp_path / 'target.npz', tmp_path / 'executed', torch.ones(2, 2)

    class Evil:
        def __reduce__(self):
            return open, (str(executed), 'w')

    torch.save(tensors_of(torch, discrete_weights()), tmp_path / 'good.pt')
    content = (tmp_path / 'good.pt').read_bytes()
    contents = {'cut': content[:len(content) // 2], 'empty': b'', 'text': b'These are no weights.\n',
                'zeros': bytes(1000), 'pickle': pickle.dumps({'stem.0.weight': Evil()})}
    for name, content in contents.items():
        (tmp_path / f'{name}.pt').write_bytes(content)
    for name in (*contents, 'absent'):
        assert_refused(tmp_path / f'{name}.pt', target, 'DARTS_PADDLE', f'{name}.pt')
    for content, reason in (
            ([tensor], 'list'), ({}, 'dict'), (tensor, 'Tensor'), (3, 'int'),
            ({'state_dict': Evil()}, 'without executing'), (Evil(), 'without executing'),
            (torch.nn.Linear(2, 2), 'without executing'), ({'model': {'stem.0.weight': tensor}}, "'model' is a dict"),
            ({'stem.0.weight': [1.0, 2.0]}, "'stem.0.weight' is a list"), ({0: tensor}, 'the entry 0'),
            ({'x': tensor.to(torch.complex64)}, "'x'"), ({'x': tensor.to_sparse()}, "'x'"),
            ({'x': tensor.to_sparse_csr()}, ''), ({'x': torch.ones(2, 2, device='meta')}, ''),
            ({'x': torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)}, ''),
            ({'x': torch.ones(1).expand(1 << 40)}, 'claim to be larger than the file')):
        torch.save(content, tmp_path / 'source.pt')
        assert_refused(tmp_path / 'source.pt', target, 'DARTS_PADDLE', 'source.pt', reason)
    assert not executed.exists()
    pickle.loads((tmp_path / 'pickle.pt').read_bytes())       # execution would have created the file
    assert executed.exists()


def test_a_changed_bit_in_a_state_dict_is_found(tmp_path, torch):
    """torch.load ignores the checksums."""
    weights, path = tensors_of(torch, discrete_weights()), tmp_path / 'source.pt'
    torch.save(weights, path)
    content, number = bytearray(path.read_bytes()), weights['stem.0.weight'].numpy().tobytes()
    content[content.index(number)] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)['stem.0.weight'], weights['stem.0.weight'])
    assert_refused(path, tmp_path / 'target.npz', 'DARTS_PADDLE', 'the checksum of')
    # torch.load would return uninitialised memory for a tensor that the zip's directory marks as a folder.
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        number = next(k for k, member in enumerate(file.infolist()) if member.filename.endswith('data/0'))
    entry = [match.start() for match in re.finditer(b'PK\x01\x02', bytes(content))][number]
    content[entry + 38] = 0x10                    # external attributes
    path.write_bytes(content)
    assert_same(convert_weights.from_state_dict(convert_weights.read_state_dict(str(path))), discrete_weights())


@pytest.mark.parametrize('flags, reason', [
    (['--arch', 'DARTS_V9', 'source.npz', 'target.pt'], 'DARTS_V2'),
    (['--arch', 'DARTS_PADDLE', 'source.npz', 'target.npz'], 'target.npz has to be an .npz'),
    (['--arch', 'DARTS_PADDLE', 'source.pt', 'target.pt'], 'target.pt has to be an .npz'),
    (['--supernet', 'source.npz', 'target.pt'], 'source.npz does not fit a supernet'),
    (['source.npz', 'target.pt'], '--arch'),
    (['--arch', 'DARTS_PADDLE', '--supernet', 'source.npz', 'target.pt'], '--supernet'),
    (['--arch', 'DARTS_PADDLE', 'source.npz'], 'target')])
def test_a_mistake_on_the_command_line(tmp_path, flags, reason):
    write_npz(tmp_path / 'source.npz', discrete_weights())
    start = run if flags[0] == '--supernet' else run_in_process              # once a process of its own
    paths = [tmp_path / flag if flag.endswith(('.npz', '.pt')) else flag for flag in flags]
    assert_one_line(start(SCRIPT, *paths), reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source.npz']


def test_a_target_that_cannot_be_written(tmp_path, torch):
    source, other = write_npz(tmp_path / 'source.npz', discrete_weights()), str(tmp_path / 'source.pt')
    convert(source, other, 'DARTS_PADDLE')
    for path, target in ((source, 'no_folder/target.pt'), (other, 'no_folder/target.npz')):
        assert_one_line(run_in_process(SCRIPT, '--arch', 'DARTS_PADDLE', path, tmp_path / target), target)
