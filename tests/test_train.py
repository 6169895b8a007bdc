"""Training as its user runs it, on CIFAR-sized pictures and on ImageNet's files: to the end, interrupted, resumed,
evaluated, and with bad input."""
import json
import re

import numpy as np
import pytest

import genotypes
import make_sample
import pictures
import reader
import train
import train_imagenet
import train_search
from engine import checkpoint, trainer
from model import NetworkCIFAR, network_of
from runs import assert_one_line, last_checkpoint, history, run, run_well, stop_at, without_seconds

SMALL = ['--init_channels', '4', '--layers', '3', '--use_gpu', 'False']


@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    """A folder with the first 24 training and 5 test images of each class of the sample."""
    folder = tmp_path_factory.mktemp('sample')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(folder), train=24, test=5)
    return folder


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """36 + 15 JPEG and PNG files of 3 classes in ImageNet's layout, of all sizes and modes."""
    folder = tmp_path_factory.mktemp('imagenet')
    pictures.make_imagenet(folder)
    return folder


@pytest.fixture(scope='module')
def commands(sample, imagenet):
    """{script: (command without the folder of the run, steps an epoch, test images)}; both have a last,
    smaller batch of test images."""
    return {
        'train.py': (['train.py', '--dataset', 'fashion_mnist_sample', '--data', sample, '--batch_size', '24', *SMALL],
                     10, 50),
        'train_imagenet.py': (['train_imagenet.py', '--data_dir', imagenet, '--class_num', '3', '--batch_size', '8',
                               '--learning_rate', '0.005', '--drop_path_prob', '0.1', *SMALL], 4, 15)}


@pytest.fixture(scope='module', params=['train.py', 'train_imagenet.py'])
def finished(request, tmp_path_factory, commands):
    """A finished training, -> (script, its folder, what it printed)."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    command, *_ = commands[request.param]
    return request.param, folder, run_well(*command, '--model_save_dir', folder, '--epochs', '3', '--report_freq', '2')


def test_the_loss_falls_and_everything_is_written(finished, commands):
    script, folder, _ = finished
    lines = history(folder)
    assert [line['epoch'] for line in lines] == [1, 2, 3]
    assert lines[-1]['train_loss'] < lines[0]['train_loss']
    if script == 'train.py':
        assert [line['lr'] for line in lines] == pytest.approx([0.025, 0.025 * 0.75, 0.025 * 0.25])
        assert [line['drop_path_prob'] for line in lines] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    else:
        assert [line['lr'] for line in lines] == pytest.approx([0.005, 0.005 * 0.97, 0.005 * 0.97 ** 2])
    tops = [line['valid_top1'] for line in lines]
    assert [line['best_top1'] for line in lines] == list(np.maximum.accumulate(tops))
    args = json.loads((folder / 'args.json').read_text())
    assert (args['arch'], args['auxiliary'], args['momentum']) == ('DARTS_PADDLE', True, 0.9)
    steps = commands[script][1]
    assert f'epoch 3 step {steps}/{steps}' in (folder / 'log.txt').read_text()
    about, weights = checkpoint.read_weights(folder / 'last.npz')
    assert genotypes.check(about['genotype']) == genotypes.DARTS_PADDLE
    assert about['class_names'][1] == {'train.py': 'Trouser', 'train_imagenet.py': 'n00000001'}[script]
    assert 'auxiliary_head.classifier.weight' in weights and 'cells.0.preprocess1.op.2.running_mean' in weights


def test_what_it_prints(finished):
    script, folder, output = finished
    lines = output.splitlines()
    network = network_of(genotypes.DARTS_PADDLE, checkpoint.read_weights(folder / 'last.npz')[1])
    assert re.fullmatch(r'device: CPU \(\d+ cores\), Paddle \d+\.\d+\.\d+', lines[0])
    assert lines[1] == f'param size = {network.param_count / 1e6:.6f}MB'
    assert lines[2] == f'multiply-adds = {network.multiply_adds / 1e6:.1f}M per image'
    assert re.fullmatch(r'graph ready in \d+\.\d s \(\d+ operators\)', lines[3])
    assert re.search(r'epoch 1 step 2/\d+: loss \d\.\d{4}, top-1 .* %, top-5 .* %, lr 0\.0', output)
    assert re.search(r'epoch 3: test loss \d+\.\d{4}, top-1 .* %, top-5 .* %, best top-1 .* %', output)


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(tmp_path, finished, commands):
    script, uninterrupted, _ = finished
    command = [*commands[script][0], '--model_save_dir', tmp_path / 'run', '--epochs', '3']
    stop_at('epoch 2 step 2/', *command, '--report_freq', '2')
    assert last_checkpoint(tmp_path / 'run')[1]['epoch'] == 1
    run_well(*command, '--resume', '--num_workers', '0')
    assert last_checkpoint(tmp_path / 'run') == last_checkpoint(uninterrupted)
    assert without_seconds(tmp_path / 'run') == without_seconds(uninterrupted)
    for name in ('best.npz', 'last.npz'):
        (about, ours), (_, theirs) = (checkpoint.read_weights(folder / name) for folder in (tmp_path / 'run', uninterrupted))
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs) and set(ours) == set(theirs)


def test_eval_only_gives_what_the_training_measured(finished, commands):
    script, folder, _ = finished
    command, _, images = commands[script]
    lines = history(folder)
    best = max(lines, key=lambda line: line['valid_top1'])           # the first of equals
    for name, line in (('last.npz', lines[-1]), ('best.npz', best)):
        output = run_well(*command, '--eval_only', '--pretrained', folder / name)
        assert output.splitlines()[-1] == (
            f"loss {line['valid_loss']:.4f}, top-1 {100 * line['valid_top1']:.2f} %, "
            f"top-5 {100 * line['valid_top5']:.2f} % ({images} images)")


def test_every_test_image_counts_once_and_alike(sample):
    """Whatever the batches are, the last and smaller one included; top-5 and the loss from the logits by hand."""
    data = reader.load('fashion_mnist_sample', str(sample))
    network = NetworkCIFAR(genotypes.DARTS_V2, 4, 10, 3, with_training=False)
    batches = [reader.Batches(data.test_images, data.test_labels, size, data.mean, data.std, seed=0, shuffle=False)
               for size in (24, 50)]
    images, labels = batches[1].batch(0, 0)
    logits = network.logits(images).astype('float64')
    mine = logits[np.arange(50), labels[:, 0]]
    rank = (logits > mine[:, None]).sum(axis=1)
    loss = (np.log(np.exp(logits).sum(axis=1)) - mine).mean()
    for each in batches:
        args = type('Args', (), {'num_workers': 1, 'batch_size': each.batch_size})
        meter = trainer.evaluate(network, each, args)
        means = meter.means('test')
        assert meter.images == 50
        assert means['test_loss'] == pytest.approx(loss, rel=1e-5)
        assert (means['test_top1'], means['test_top5']) == ((rank < 1).sum() / 50, (rank < 5).sum() / 50)


def test_a_training_can_start_with_given_weights(tmp_path, finished, commands):
    script, folder, _ = finished
    run_well(*commands[script][0], '--model_save_dir', tmp_path / 'run', '--epochs', '1', '--momentum', '0',
             '--learning_rate', '1e-12', '--pretrained', folder / 'best.npz')
    _, given = checkpoint.read_weights(folder / 'best.npz')
    _, found = checkpoint.read_weights(tmp_path / 'run' / 'last.npz')
    for name, array in found.items():
        if not name.endswith(('.running_mean', '.running_var')):
            assert np.allclose(array, given[name], atol=1e-9), name


def test_a_genotype_of_a_search_is_trained_and_kept_for_the_resumption(tmp_path, commands):
    path = tmp_path / 'genotype.json'
    path.write_text(genotypes.dumps(genotypes.DARTS_V1))
    command = [*commands['train.py'][0], '--model_save_dir', tmp_path / 'run', '--arch', path, '--epochs', '1']
    run_well(*command, '--auxiliary', 'False', '--drop_path_prob', '0')
    about, weights = checkpoint.read_weights(tmp_path / 'run' / 'best.npz')
    assert genotypes.check(about['genotype']) == genotypes.DARTS_V1
    assert not any(name.startswith('auxiliary') for name in weights)
    # The search went on and wrote another: the run is not continued as another network.
    path.write_text(genotypes.dumps(genotypes.DARTS_V2))
    assert_one_line(run(*command, '--auxiliary', 'False', '--drop_path_prob', '0', '--resume'),
                    'is from a run with other settings', 'genotype')


@pytest.mark.parametrize('finished', ['train_imagenet.py'], indirect=True)
def test_lists_are_read_too(tmp_path, finished, imagenet, commands):
    script, folder, _ = finished
    for half in ('train', 'val'):
        (tmp_path / half).symlink_to(imagenet / half)
    pictures.write_lists(tmp_path)
    flags = ['--eval_only', '--pretrained', folder / 'best.npz']
    assert run_well(*commands[script][0], *flags) == run_well(*commands[script][0], '--data_dir', tmp_path, *flags)


@pytest.mark.parametrize('flags, reasons', [
    (['--arch', 'RESNET'], ['RESNET', 'AmoebaNet, DARTS, DARTS_PADDLE, DARTS_V1, DARTS_V2, FASHION_MNIST_0, '
                                      'FASHION_MNIST_1, NASNet']),
    (['--eval_only'], ['--pretrained PATH']),
    (['--pretrained', 'nowhere.npz'], ['nowhere.npz is missing']),
    (['--pretrained', __file__], ['test_train.py holds no weights', 'scripts/convert_weights.py']),
    (['--drop_path_prob', '1.5'], ['argument --drop_path_prob']),
    (['--auxiliary', 'perhaps'], ["argument --auxiliary: 'perhaps' is neither True nor False"]),
    (['--layers', '1'], ['with --layers 1', '--auxiliary False']),
    (['--init_channels', '5'], ['init_channels is 5']),
    (['--class_num', '7'], ['--class_num 7', 'classes']),
    (['--batch_size', '5000'], ['5000']),
    (['--resume'], ['no checkpoint in']),
    (['--data', 'nowhere'], ['nowhere']),
    (['--data_dir', 'nowhere'], ['no ImageNet in nowhere', 'train_list.txt']),
    (['--decay_rate', '0'], ['argument --decay_rate']),
    (['--label_smooth', '-1'], ['argument --label_smooth']),
])
def test_bad_input_ends_in_one_line(tmp_path, commands, flags, reasons):
    of_imagenet = flags[0] in ('--data_dir', '--decay_rate', '--label_smooth')
    for script in commands:
        if script == ('train_imagenet.py' if of_imagenet else 'train.py') or flags[0] in ('--arch', '--eval_only'):
            done = run(*commands[script][0], '--model_save_dir', tmp_path / 'run', *flags)
            assert_one_line(done, *reasons)
            assert not (tmp_path / 'run' / 'best.npz').exists()


def test_weights_of_another_network_are_refused(finished, commands):
    script, folder, _ = finished
    command = [*commands[script][0], '--eval_only', '--pretrained', folder / 'best.npz']
    assert_one_line(run(*command, '--init_channels', '6'), 'weight stem', 'has shape', 'expected')
    assert_one_line(run(*command, '--layers', '4'), "weight 'cells.", 'is missing')
    assert_one_line(run(*command, '--arch', 'DARTS_V2'), 'weight')
    checkpoint_path = folder / last_checkpoint(folder)[0]
    assert_one_line(run(*command[:-1], checkpoint_path), 'it is a checkpoint', 'best.npz')


# Flag: defaults of train_search.py, train.py and train_imagenet.py; None where a script does not have it.
DEFAULTS = {
    'batch_size': (64, 96, 128), 'learning_rate': (0.025, 0.025, 0.1), 'learning_rate_min': (0.001, None, None),
    'decay_rate': (None, None, 0.97), 'momentum': (0.9, 0.9, 0.9), 'weight_decay': (3e-4, 3e-4, 3e-5),
    'grad_clip': (5, 5, 5), 'epochs': (50, 600, 250), 'init_channels': (16, 36, 48), 'layers': (8, 20, 14),
    'cutout': (True, True, None), 'cutout_length': (16, 16, None), 'train_portion': (0.5, None, None),
    'arch_learning_rate': (3e-4, None, None), 'arch_weight_decay': (1e-3, None, None), 'unrolled': (True, None, None),
    'auxiliary': (None, True, True), 'auxiliary_weight': (None, 0.4, 0.4), 'drop_path_prob': (None, 0.2, 0.0),
    'label_smooth': (None, None, 0.1), 'arch': (None, 'DARTS_PADDLE', 'DARTS_PADDLE'),
    'model_save_dir': ('search', 'eval_cifar10', 'eval_imagenet'), 'report_freq': (50, 50, 100)}


@pytest.mark.parametrize('number, script', enumerate((train_search, train, train_imagenet)))
def test_flags_have_the_defaults_of_the_recipes(number, script):
    args = vars(script.parse_args([]))
    for flag, defaults in DEFAULTS.items():
        assert args.get(flag) == defaults[number], flag
    assert {'num_workers', 'use_gpu', 'seed', 'resume'} <= set(args)
    if script is train_imagenet:
        assert (args['data_dir'], args['class_num']) == ('dataset/ILSVRC2012', 1000)
    else:
        # None: of the data set, whose folder and number of classes are these.
        assert (args['dataset'], args['data'], args['class_num']) == ('cifar10', None, None)
        assert reader.default_folder('cifar10') == 'dataset/cifar10'
        assert len(reader.DATASETS['cifar10'].class_names) == 10
