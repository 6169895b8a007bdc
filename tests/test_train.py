"""The search and both trainings from the command line: results, log lines, stop and resume, evaluation, bad input."""
import json
import re

import numpy as np
import paddle
import pytest

import genotypes
import make_sample
import pictures
import reader
import train
import train_imagenet
import train_search
from engine import checkpoint
from model import NetworkCIFAR, network_of
from model_search import Supernet
from runs import (assert_equal_runs, assert_one_line, checkpoint_names, history, last_checkpoint, output_of,
                  run_in_process, stop_at)

SEARCH, TRAIN, IMAGENET = SCRIPTS = ('train_search.py', 'train.py', 'train_imagenet.py')
STEPS = {SEARCH: 12, TRAIN: 10, IMAGENET: 4}                          # per epoch
LEARNING_RATES = {SEARCH: [0.025, 0.001 + 0.024 / 2], TRAIN: [0.025, 0.025 * 0.75, 0.025 * 0.25],
                  IMAGENET: [0.005, 0.005 * 0.97, 0.005 * 0.97 ** 2]}


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    """{script: command of a small run without --model_save_dir}; the last batch of test images is smaller."""
    sample, imagenet = tmp_path_factory.mktemp('sample'), tmp_path_factory.mktemp('imagenet')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(sample), train=24, test=5)    # of each class
    pictures.make_imagenet(imagenet)
    small = ['--use_gpu', 'False', '--layers', '3', '--init_channels']
    data = ['--dataset', 'fashion_mnist_sample', '--data', sample]
    return {SEARCH: [SEARCH, *small, '2', *data, '--batch_size', '10', '--epochs', '2'],
            TRAIN: [TRAIN, *small, '4', *data, '--batch_size', '24', '--epochs', '3'],
            IMAGENET: [IMAGENET, *small, '4', '--data_dir', imagenet, '--class_num', '3', '--batch_size', '8',
                       '--epochs', '3', '--learning_rate', '0.005', '--drop_path_prob', '0.1']}


@pytest.fixture(scope='module', params=SCRIPTS)
def finished(request, tmp_path_factory, commands):
    """A finished run, -> (script, its folder, stdout)."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    return request.param, folder, output_of(*commands[request.param], '--model_save_dir', folder, '--report_freq', '2')


trainings = pytest.mark.parametrize('finished', [TRAIN, IMAGENET], indirect=True)


def test_the_loss_falls_and_all_results_are_written(finished):
    script, folder, _ = finished
    lines = history(folder)
    first, last = lines[0], lines[-1]
    assert [line['epoch'] for line in lines] == list(range(1, len(lines) + 1))
    assert last['train_loss'] < first['train_loss'] - 0.05
    assert [line['lr'] for line in lines] == pytest.approx(LEARNING_RATES[script])
    args = json.loads((folder / 'args.json').read_text())
    assert (args['momentum'], args['class_num']) == (0.9, 3 if script == IMAGENET else 10)
    assert f'epoch {len(lines)} step {STEPS[script]}/{STEPS[script]}' in (folder / 'log.txt').read_text()
    common = {'epoch', 'lr', 'train_loss', 'train_top1', 'train_top5', 'seconds'}
    if script == SEARCH:
        assert set(last) == common | {
            'valid_loss', 'valid_top1', 'valid_top5', 'skip_connects', 'entropy_normal', 'entropy_reduce',
            'alphas_normal', 'alphas_reduce', 'genotype', 'space'}
        for kind in ('normal', 'reduce'):
            weights = np.array(last[f'alphas_{kind}'])
            assert weights.shape == (14, 8) and np.allclose(weights.sum(axis=1), 1)
            assert not np.array_equal(weights, first[f'alphas_{kind}'])
        assert genotypes.check(last['genotype']) == genotypes.load(str(folder / 'genotype.json'))
        return
    assert set(last) == common | {'test_loss', 'test_top1', 'test_top5', 'best_top1', 'drop_path_prob'}
    assert [line['best_top1'] for line in lines] == list(np.maximum.accumulate([line['test_top1'] for line in lines]))
    largest = {TRAIN: 0.2, IMAGENET: 0.1}[script]
    assert [line['drop_path_prob'] for line in lines] == pytest.approx([0, largest / 3, largest * 2 / 3])
    metadata, weights = checkpoint.read_weights(folder / 'last.npz')
    assert genotypes.check(metadata['genotype']) == genotypes.DARTS_PADDLE
    assert metadata['class_names'][1] == {TRAIN: '1', IMAGENET: 'n00000001'}[script]
    assert 'auxiliary_head.classifier.weight' in weights and 'cells.0.preprocess1.op.2.running_mean' in weights


def test_log_lines(finished):
    script, folder, output = finished
    lines = output.splitlines()
    if script != IMAGENET:
        assert lines.pop(0).endswith('240 + 50 images of 28 x 28, 10 classes with numbers as names')
    device, *lines = lines
    assert re.fullmatch(r'device: CPU \(\d+ cores\), Paddle \d+\.\d+\.\d+', device)
    if script == SEARCH:
        assert lines.pop(0) == f'search space: 4 nodes, {",".join(genotypes.DARTS_SPACE.primitives)}'
    size = lines.pop(0)
    if script == SEARCH:
        assert re.fullmatch(r'param size = 0\.\d{6}MB', size)
        for expected in ('mixing weights of alphas_normal', 'mixing weights of alphas_reduce',
                         'genotype = Genotype(normal=((', 'epoch 2: validation loss'):
            assert f'\n{expected}' in output
    else:
        network = network_of(genotypes.DARTS_PADDLE, checkpoint.read_weights(folder / 'last.npz')[1])
        assert size == f'param size = {network.param_count / 1e6:.6f}MB'
        assert lines.pop(0) == f'multiply-adds = {network.multiply_adds / 1e6:.1f}M per image'
        assert re.search(r'^epoch 3: test loss \d+\.\d{4}, top-1 .* %, top-5 .* %, best top-1 .* %$', output, re.M)
    assert re.fullmatch(r'graph ready in \d+\.\d s \(\d+ operators\)', lines[0])


@pytest.mark.parametrize('finished', [SEARCH, TRAIN, pytest.param(IMAGENET, marks=pytest.mark.slow)], indirect=True)
def test_stopped_by_sigterm_and_resumed_equals_uninterrupted(tmp_path, finished, commands):
    """Stopped is a real process; the other two runs are in this one."""
    script, uninterrupted, _ = finished
    command = [*commands[script], '--model_save_dir', tmp_path / 'run']
    stop_at('epoch 2 step 2/', *command, '--report_freq', '2')
    stopped = last_checkpoint(tmp_path / 'run')[1]
    assert stopped['epoch'] == 1 and 2 <= stopped['step'] <= STEPS[script]
    output_of(*command, '--resume', '--num_workers', '0')
    assert_equal_runs(tmp_path / 'run', uninterrupted)


@trainings
def test_eval_only_equals_the_measurement_of_the_training(tmp_path, finished, commands):
    script, folder, _ = finished
    command, lines = [*commands[script], '--eval_only', '--pretrained'], history(folder)
    best = max(lines, key=lambda line: line['test_top1'])             # the first of equals
    for name, line in (('last.npz', lines[-1]), ('best.npz', best)):
        output = output_of(*command, folder / name)
        assert output.splitlines()[-1] == (
            f"loss {line['test_loss']:.4f}, top-1 {100 * line['test_top1']:.2f} %, "
            f"top-5 {100 * line['test_top5']:.2f} % ({50 if script == TRAIN else 15} images)")
    if script == IMAGENET:                                            # equal for lists of the same images
        for half in ('train', 'val'):
            (tmp_path / half).symlink_to(command[command.index('--data_dir') + 1] / half)
        pictures.write_lists(tmp_path)
        assert output_of(*command, folder / 'best.npz', '--data_dir', tmp_path) == output


@trainings
def test_a_training_can_start_with_given_weights(tmp_path, finished, commands):
    script, folder, _ = finished
    output_of(*commands[script], '--model_save_dir', tmp_path / 'run', '--epochs', '1', '--momentum', '0',
              '--learning_rate', '1e-12', '--pretrained', folder / 'best.npz')
    _, given = checkpoint.read_weights(folder / 'best.npz')
    _, found = checkpoint.read_weights(tmp_path / 'run' / 'last.npz')
    for name, array in found.items():
        if not name.endswith(('.running_mean', '.running_var')):
            assert np.allclose(array, given[name], atol=1e-9), name


def test_a_search_can_start_with_given_weights_and_alphas(tmp_path, commands):
    supernet, given = Supernet(2, 10, 3, seed=5, build_programs=False), tmp_path / 'given.npz'
    with open(given, 'wb') as file:
        checkpoint.write_arrays(file, {}, dict(supernet.weights(), **supernet.alphas()))
    command = [*commands[SEARCH], '--model_save_dir', tmp_path / 'run', '--pretrained', given]
    assert_one_line(run_in_process(*command, '--init_channels', '4'), 'weight', 'has shape')
    output_of(*command, '--epochs', '1', '--unrolled', 'False', '--momentum', '0', '--learning_rate', '1e-12',
              '--learning_rate_min', '0', '--arch_learning_rate', '0', '--batch_size', '60')
    _, state = checkpoint.read_checkpoint(tmp_path / 'run' / checkpoint_names(tmp_path / 'run')[-1])
    assert np.array_equal(state['alphas'], supernet.store.get('alphas'))
    assert np.allclose(state['theta'], supernet.store.get('theta'), atol=1e-9)


def test_the_genotype_of_a_search_is_trained_and_compared_at_a_resume(tmp_path, commands):
    path = tmp_path / 'genotype.json'
    path.write_text(genotypes.dumps(genotypes.DARTS_V1))
    command = [*commands[TRAIN], '--model_save_dir', tmp_path / 'run', '--arch', path, '--epochs', '1',
               '--auxiliary', 'False', '--drop_path_prob', '0']
    output_of(*command)
    metadata, weights = checkpoint.read_weights(tmp_path / 'run' / 'best.npz')
    assert genotypes.check(metadata['genotype']) == genotypes.DARTS_V1
    assert not any(name.startswith('auxiliary') for name in weights)
    # The search has continued and written another genotype: the run is not resumed as another network.
    path.write_text(genotypes.dumps(genotypes.DARTS_V2))
    assert_one_line(run_in_process(*command, '--resume'), 'is from a run with other settings', 'genotype')


@trainings
def test_weights_of_another_network_are_refused(finished, commands):
    script, folder, _ = finished
    command = [*commands[script], '--eval_only', '--pretrained', folder / 'best.npz']
    assert_one_line(run_in_process(*command, '--init_channels', '6'), '--init_channels 6 contradicts', 'has 4')
    assert_one_line(run_in_process(*command, '--layers', '4'), '--layers 4 contradicts', 'has 3')
    assert_one_line(run_in_process(*command, '--arch', 'DARTS_V2'), 'trained with DARTS_PADDLE, not with DARTS_V2: '
                    "normal edge 0 is ('dil_conv_3x3', 0) there, ('sep_conv_3x3', 0) in --arch")
    other = {TRAIN: IMAGENET, IMAGENET: TRAIN}[script]
    assert_one_line(run_in_process(*commands[other], '--eval_only', '--pretrained', folder / 'best.npz'),
                    f'holds the weights of a Network{"CIFAR" if script == TRAIN else "ImageNet"}: use {script}')
    path = folder / last_checkpoint(folder)[0]
    assert_one_line(run_in_process(*command[:-1], path), 'it is a checkpoint', 'best.npz')


def test_weights_are_evaluated_as_the_network_that_they_are(tmp_path, commands):
    """Genotypes of equal shapes: another input of an edge, a pool. No flag is needed, a contradiction is an error."""
    searched = genotypes.DARTS_V1._replace(normal=(('skip_connect', 1), *genotypes.DARTS_V1.normal[1:]))
    twins = [searched._replace(normal=(('skip_connect', 0), *searched.normal[1:])),
             searched._replace(normal=(('avg_pool_3x3', 1), *searched.normal[1:]))]
    (tmp_path / 'a.json').write_text(genotypes.dumps(searched))
    data = commands[TRAIN][commands[TRAIN].index('--dataset'):][:4]
    training = [TRAIN, '--use_gpu', 'False', *data, '--model_save_dir', tmp_path / 'run', '--arch', tmp_path / 'a.json',
                '--layers', '3', '--init_channels', '4', '--epochs', '1', '--batch_size', '40']
    output_of(*training)
    weights = tmp_path / 'run' / 'best.npz'
    evaluation = [TRAIN, '--use_gpu', 'False', *data, '--eval_only', '--pretrained', weights]
    figure = f"loss {history(tmp_path / 'run')[-1]['test_loss']:.4f}"
    assert figure in output_of(*evaluation) and figure in output_of(*evaluation, '--arch', tmp_path / 'a.json')
    for twin, edge in zip(twins, ("('skip_connect', 0)", "('avg_pool_3x3', 1)")):
        (tmp_path / 'b.json').write_text(genotypes.dumps(twin))
        for flags in (evaluation, [TRAIN, *data, '--pretrained', weights, '--model_save_dir', tmp_path / 'other']):
            assert_one_line(run_in_process(*flags, '--arch', tmp_path / 'b.json'), 'was trained with another genotype',
                            f"normal edge 0 is ('skip_connect', 1) there, {edge} in --arch")
    # Weights of a conversion may not record a genotype: it is not guessed.
    _, arrays = checkpoint.read_weights(weights)
    with open(tmp_path / 'plain.npz', 'wb') as file:
        checkpoint.write_arrays(file, {}, arrays)
    assert_one_line(run_in_process(*evaluation[:-1], tmp_path / 'plain.npz'), 'does not record its genotype: give --a')
    assert figure in output_of(*evaluation[:-1], tmp_path / 'plain.npz', '--arch', tmp_path / 'a.json')


@pytest.mark.parametrize('auxiliary', [True, False])
def test_fine_tuning_on_other_classes_loads_all_but_the_classifiers(tmp_path, commands, auxiliary):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), 'uint8')
    np.savez(tmp_path / 'x.npz', train_images=images[:20], train_labels=np.arange(20) % 4, test_images=images[20:],
             test_labels=np.arange(10) % 4, class_names=np.array(list('abcd')))
    network = NetworkCIFAR(genotypes.DARTS_V2, 4, 10, 3, auxiliary=0.4, seed=3, build_programs=False)
    given = dict(network.weights(), **{'classifier.bias': np.full(10, 9, 'float32')})
    metadata = {'genotype': genotypes.DARTS_V2._asdict(), 'class_names': list('0123456789'), 'image_size': 32}
    with open(tmp_path / 'ten.npz', 'wb') as file:
        checkpoint.write_arrays(file, metadata, given)
    command = [TRAIN, '--use_gpu', 'False', '--dataset', 'npz', '--data', tmp_path / 'x.npz', '--cutout', 'False',
               '--pretrained', tmp_path / 'ten.npz']
    output = output_of(*command, '--auxiliary', auxiliary, '--epochs', '1', '--batch_size', '10', '--learning_rate',
                       '1e-12', '--momentum', '0', '--model_save_dir', tmp_path / 'run')
    assert 'ten.npz is for 10 classes: all its weights but those of the classifiers are loaded' in output
    metadata, found = checkpoint.read_weights(tmp_path / 'run' / 'last.npz')
    assert [metadata[name] for name in ('class_num', 'init_channels', 'layers', 'image_size')] == [4, 4, 3, 8]
    assert genotypes.check(metadata['genotype']) == genotypes.DARTS_V2
    compared = 0
    for name, array in found.items():
        if name.endswith(('.running_mean', '.running_var')) or 'classifier' in name:
            assert 'classifier' not in name or len(array) == 4
        else:
            assert np.allclose(array, given[name], atol=1e-9), name
            compared += name.startswith('auxiliary_head')
    assert (compared > 0) == auxiliary
    assert_one_line(run_in_process(*command, '--eval_only'), 'ten.npz is for images of 32 x 32, npz has 8 x 8')
    with open(tmp_path / 'ten.npz', 'wb') as file:
        checkpoint.write_arrays(file, dict(metadata, class_names=list('abcx')), found)
    assert_one_line(run_in_process(*command, '--eval_only'), "other classes than those of npz: 'x' there, 'd' here")


@pytest.mark.parametrize('scripts, flags, reasons', [
    (SCRIPTS, '--batch_size 5000', ['5000']),
    (SCRIPTS, '--class_num 7', ['7', 'classes']),
    (SCRIPTS, '--init_channels 5', ['init_channels is 5']),
    (SCRIPTS, '--model_save_dir /dev/null/run', ['cannot write to']),
    (SCRIPTS, '--pretrained nowhere.npz', ['nowhere.npz does not exist']),
    (SCRIPTS, '--use_gpu True', ['--use_gpu True: ', 'without the flag the CPU is used']),
    ([SEARCH], '--layers 2', ['layers is 2']),
    ([SEARCH, TRAIN], '--data nowhere', ['nowhere']),
    ([TRAIN, IMAGENET], '--arch RESNET', ['RESNET', 'AmoebaNet, DARTS, DARTS_PADDLE, DARTS_V1, DARTS_V2, '
                                                    'FASHION_MNIST, NASNet, PC_DARTS_CIFAR, '
                                                    'PC_DARTS_IMAGENET']),
    ([TRAIN, IMAGENET], f'--pretrained {__file__}', ['test_train.py holds no weights', 'scripts/convert_weights.py']),
    ([IMAGENET], '--data_dir nowhere', ['no ImageNet in nowhere', 'train_list.txt']),
    ([SEARCH, TRAIN], '--dataset imagenet', ["error: argument --dataset: invalid choice: 'imagenet'"]),
    (SCRIPTS, '--batch_size 0', ["--batch_size: '0' has to be a whole number from 1"]),
    (SCRIPTS, '--batch_size many', ['.py: error: argument --batch_size']),
    (SCRIPTS, '--learning_rate nan', ["'nan' has to be a number above 0"]),
    (SCRIPTS, '--epochs -1', ['argument --epochs']),
    ([SEARCH], '--unrolled maybe', ["argument --unrolled: 'maybe' is neither True nor False"]),
    ([SEARCH], '--train_portion 1.5', ['argument --train_portion']),
    ([SEARCH], '--stop_at_skips 9', ["--stop_at_skips 9: a cell of 4 nodes has 8 edges"]),
    ([TRAIN, IMAGENET], '--eval_only', ['--pretrained PATH']),
    ([TRAIN, IMAGENET], '--drop_path_prob 1.5', ['argument --drop_path_prob']),
    ([TRAIN, IMAGENET], '--auxiliary perhaps', ["argument --auxiliary: 'perhaps' is neither True nor False"]),
    ([IMAGENET], '--decay_rate 0', ['argument --decay_rate']),
    ([IMAGENET], '--label_smooth -1', ['argument --label_smooth'])])
def test_bad_input_ends_in_one_line(tmp_path, commands, scripts, flags, reasons):
    if '--use_gpu' in flags and paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip('there is a GPU')
    for script in scripts:
        folder = tmp_path / script
        assert_one_line(run_in_process(*commands[script], '--model_save_dir', folder, *flags.split()), *reasons)
        assert not (folder / 'best.npz').exists() and not (folder / 'genotype.json').exists()


COMMON = dict(momentum=0.9, grad_clip=5, seed=0, use_gpu=None, deterministic=False, custom_ops=True, num_workers=2,
              resume=False, visualdl=None, pretrained=None)
CIFAR = dict(COMMON, dataset='cifar10', data=None, image_size=None, test_portion=None,
             cutout=True, cutout_length=16, learning_rate=0.025,
             weight_decay=3e-4, class_num=None, report_freq=50, save_freq=50)
TRAINING = dict(given=set(), arch='DARTS_PADDLE', auxiliary=True, auxiliary_weight=0.4, eval_only=False)


@pytest.mark.parametrize('script, defaults', [
    (train_search, dict(CIFAR, batch_size=64, epochs=50, init_channels=16, layers=8, learning_rate_min=0.001,
                        train_portion=0.5, arch_learning_rate=3e-4, arch_weight_decay=1e-3, unrolled=True,
                        stop_at_skips=None, curvature_freq=None, stop_at_curvature=None, recipe='darts',
                        partial_channels=1, arch_start_epoch=0, random=False, model_save_dir='search', nodes=4,
                        primitives=[
                            'none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5',
                            'dil_conv_3x3', 'dil_conv_5x5'])),
    (train, dict(CIFAR, **TRAINING, batch_size=96, epochs=600, init_channels=36, layers=20, drop_path_prob=0.2,
                 model_save_dir='eval_cifar10')),
    (train_imagenet, dict(COMMON, **TRAINING, batch_size=128, epochs=250, init_channels=48, layers=14,
                          drop_path_prob=0, learning_rate=0.1, decay_rate=0.97, weight_decay=3e-5, label_smooth=0.1,
                          class_num=1000, report_freq=100, save_freq=100, data_dir='dataset/ILSVRC2012',
                          model_save_dir='eval_imagenet'))])
def test_flags_have_the_defaults_of_the_recipes(script, defaults):
    assert vars(script.parse_args([])) == defaults and reader.default_folder('cifar10') == 'dataset/cifar10'
