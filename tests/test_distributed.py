"""Two ranks on the CPU: equal states after every step, averaged gradients, other world sizes after a resume, stops."""
import argparse
import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import paddle
import pytest

import architect
import averaged
import custom_reader
import genotypes
import imagenet_reader
import make_sample
import pictures
import reader
import train
import utils
from engine import checkpoint, custom_ops, device, distributed, trainer
from engine.programs import VariableStore
from engine.workers import Workers
from model import NetworkCIFAR
from model_search import Supernet
from runs import (assert_one_line, checkpoint_names, history, last_checkpoint, launch, run, run_in_process, run_two,
                  run_two_well, run_well, start_two, stop_at, without_seconds)

SMALL = ['--layers', '3', '--use_gpu', 'False', '--epochs', '2']
SCRIPTS = pytest.mark.parametrize('script', ['train_search.py', *(
    pytest.param(script, marks=pytest.mark.slow) for script in ('train.py', 'train_imagenet.py'))])


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    """{script: its command without the folder of the run}: 10, 20 and 3 steps per epoch, odd numbers of test images."""
    sample, imagenet = tmp_path_factory.mktemp('sample'), tmp_path_factory.mktemp('imagenet')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(sample), train=12, test=5)
    for name, dimensions in (('t10k-images-idx3-ubyte.gz', 3), ('t10k-labels-idx1-ubyte.gz', 1)):
        array = custom_reader.read_idx(str(sample / name), dimensions)
        make_sample.write_idx(str(sample / name), array[:45])
    pictures.make_imagenet(imagenet, train=8, valid=5)
    data = ['--dataset', 'fashion_mnist_sample', '--data', sample, '--init_channels', '2', '--batch_size', 6, *SMALL]
    return {
        'train_search.py': ['train_search.py', *data, '--curvature_freq', '2'],
        'train.py': ['train.py', *data, '--save_freq', '5'],
        'train_imagenet.py': ['train_imagenet.py', '--data_dir', imagenet, '--class_num', '3', '--batch_size', '8',
                              '--init_channels', '4', '--learning_rate', '0.005', '--drop_path_prob', '0.1',
                              '--num_workers', '1', *SMALL]}


@pytest.fixture(scope='module')
def recorded(tmp_path_factory, commands):
    """A function script -> (folder, states of both ranks, output) of a finished run of two ranks.

    The run of train_imagenet.py was begun by one process.
    """
    @functools.cache
    def of(script):
        folder = tmp_path_factory.mktemp('two') / 'run'
        command = [*commands[script], '--model_save_dir', folder, '--report_freq', '1']
        if script == 'train_imagenet.py':
            stop_at('epoch 1 step 2/', *command)
            command.append('--resume')
        output = run_two_well('tests/recorded.py', folder.parent / 'states', *command)
        return folder, [dict(np.load(folder.parent / f'states.{rank}.npz')) for rank in range(2)], output
    return of


@SCRIPTS
def test_both_ranks_have_the_same_state_after_every_step_and_send_the_needed_gradients_once(recorded, script):
    """Three times the weights in a second-order step, once in a step of a training; alpha and statistics are small."""
    _, (first, second), output = recorded(script)
    assert ', 2 processes\n' in output
    assert first.keys() == second.keys()
    searched = script == 'train_search.py'
    steps, names = ({name.rpartition('/')[part] for name in first} for part in (0, 2))
    assert {'theta', 'velocity', 'gradient'} < names
    assert ({'alphas', 'adam_mean', 'd_alpha'} if searched else {'statistics'}) < names
    assert len(steps) >= 3
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes() or name.endswith('/result'), name
    step, sent = min(steps), ('theta', 'theta', 'd_alpha', 'theta') if searched else ('theta', 'statistics')
    assert first[f'{step}/sent'].tolist() == [first[f'{step}/{name}'].nbytes for name in sent]


@SCRIPTS
def test_the_history_has_the_means_over_both_ranks(recorded, script):
    folder, states, _ = recorded(script)
    lines = history(folder)
    assert [line['epoch'] for line in lines] == [1, 2]
    # [ranks, steps, (loss, top-1, top-5, images)] of the last epoch; train_imagenet.py began the first as one process.
    results = np.array([[array for name, array in rank.items() if name.startswith('1/') and name.endswith('/result')]
                        for rank in states])
    assert np.abs(results[0, :, 0] - results[1, :, 0]).min() > 1e-4              # the losses of the shards differ
    for number, name in enumerate(('train_loss', 'train_top1', 'train_top5')):
        assert lines[-1][name] == pytest.approx(results[:, :, number].mean(), rel=1e-6), name


def first_batches(data):
    """Returns the shards of both ranks of the first training batch of train.py and train_search.py."""
    return [reader.Batches(data.train_images, data.train_labels, 6, data.mean, data.std, seed=0, shuffle=True,
                           augment=True, cutout_length=16, drop_last=True, shard=(rank, 2)).batch(0, 0)
            for rank in range(2)]


def assert_mean(array, shards, least):
    """Asserts that an array is the mean of two others, to single precision, which differ by `least` of the largest."""
    expected = np.mean(shards, axis=0)
    assert np.abs(array - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.linalg.norm(array - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.abs(shards[0] - shards[1]).max() > least * np.abs(shards[0]).max()


def test_gradient_and_validation_of_the_search_are_the_means_of_both_shards(recorded, commands):
    folder, (states, _), _ = recorded('train_search.py')
    data = reader.load('fashion_mnist_sample', str(commands['train_search.py'][4]))
    halves = [data._replace(train_images=data.train_images[half], train_labels=data.train_labels[half])
              for half in reader.split(len(data.train_images), 0.5, 0)]
    supernet = Supernet(2, 10, 3, seed=0)            # with the weights of the first step, which has updated alpha first
    supernet.store.set('alphas', states['0/0/alphas'])
    gradients = []
    for batch in first_batches(halves[0]):
        supernet.run(supernet.feed(*batch))
        gradients.append(supernet.store.get('gradient'))
    assert_mean(states['0/0/gradient'], gradients, least=0.1)

    for name in ('theta', 'alphas'):                 # of the last step
        supernet.store.set(name, states[f'1/9/{name}'])
    results = []
    for rank in range(2):
        valid = reader.Batches(halves[1].train_images, halves[1].train_labels, 6, data.mean, data.std, seed=0,
                               shuffle=False, shard=(rank, 2))
        results += [supernet.evaluate(*valid.batch(0, step)) for step in range(len(valid))]
    assert len(results) == 20
    for name, value in zip(('loss', 'top1', 'top5'), np.mean(results, axis=0)):
        assert history(folder)[-1][f'valid_{name}'] == pytest.approx(value, rel=1e-4), name


def test_the_curvature_is_that_of_the_mean_loss_of_both_shards(recorded, commands, compiled, monkeypatch):
    folder, (states, _), _ = recorded('train_search.py')
    data = reader.load('fashion_mnist_sample', str(commands['train_search.py'][4]))
    _, half = reader.split(len(data.train_images), 0.5, 0)
    custom_ops.enable(compiled)
    supernet = Supernet(2, 10, 3)
    custom_ops.enable(False)
    for name in ('theta', 'alphas'):                 # of the last step
        supernet.store.set(name, states[f'1/9/{name}'])
    first, second = (supernet.feed(*reader.Batches(
        data.train_images, data.train_labels, 6, data.mean, data.std, seed=0, shuffle=False, subset=half,
        shard=(rank, 2)).batch(0, 0)) for rank in range(2))

    def average(store, name):
        gradient = store.get(name)
        supernet.compute_alpha_gradient(second)
        store.set(name, (gradient + store.get(name)) / 2)

    search = architect.Architect(supernet, unrolled=False)
    one_shard = search.curvature(first).value
    monkeypatch.setattr(architect, 'average_gradients', average)
    values = [line.get('curvature') for line in history(folder)]
    assert values == [None, pytest.approx(search.curvature(first).value, rel=0.02)]
    assert abs(values[1] - one_shard) > 0.1 * abs(one_shard)



@pytest.mark.slow
def test_gradient_and_statistics_of_a_training_are_the_means_of_both_shards(recorded, commands):
    _, (states, _), _ = recorded('train.py')
    results = {'gradient': [], 'statistics': []}
    for batch in first_batches(reader.load('fashion_mnist_sample', str(commands['train.py'][4]))):
        network = NetworkCIFAR(genotypes.DARTS_PADDLE, 2, 10, 3, auxiliary=0.4, seed=0)
        network.run(network.feed(*batch))
        for name, shards in results.items():
            shards.append(network.store.get(name))
    for name, shards in results.items():
        assert_mean(states[f'0/0/{name}'], shards, least=0.01)


@pytest.mark.slow
def test_second_order_over_two_ranks_is_that_of_the_mean_losses(tmp_path):
    """Steps 1 to 6 in numpy, in float64, with the mean over both shards as every gradient."""
    run_two_well('tests/averaged.py', tmp_path / 'result')
    found, found_by_other = (dict(np.load(tmp_path / f'result.{rank}.npz')) for rank in range(2))
    supernet, shards = averaged.make_supernet(), [averaged.batches(shard) for shard in range(2)]
    w, v, xi = supernet.store.get('theta'), averaged.velocity(supernet), averaged.LR

    def gradients(theta, number):
        """Returns (grad_w, grad_alpha) of the train (0) or validation (1) batch."""
        supernet.store.set('theta', theta)
        results = []
        for batches in shards:
            supernet.run(supernet.feed(*batches[number]))
            results.append([supernet.store.get(name) for name in ('gradient', 'alpha_gradient')])
        return [np.mean(pair, axis=0) for pair in zip(*results)]

    g, _ = gradients(w, 0)
    u, outer = gradients(w - xi * (averaged.MOMENTUM * v + g + averaged.WEIGHT_DECAY * w), 1)
    eps = 0.01 / np.linalg.norm(u)
    h = (gradients(w + eps * u, 0)[1] - gradients(w - eps * u, 0)[1]) / (2 * eps)
    for order, expected in (('2', outer - xi * h), ('1', gradients(w, 1)[1])):
        assert np.abs(found[order] - expected).max() < 1e-9 * np.abs(expected).max()
    for name in found:
        assert found[name].tobytes() == found_by_other[name].tobytes(), name
    assert np.abs(xi * h).max() > 1e-3 * np.abs(outer).max()


@pytest.mark.slow
@pytest.mark.parametrize('script, images', [('train.py', 45), ('train_imagenet.py', 15)])
def test_an_evaluation_counts_every_image_once(recorded, commands, script, images):
    """Of two ranks at the end of the training, of one and of two afterwards; the number of images is odd."""
    folder, _, _ = recorded(script)
    command = [*commands[script], '--eval_only', '--pretrained', folder / 'last.npz']
    line, last = run_in_process(*command, '--num_workers', '0').stdout.splitlines()[-1], history(folder)[-1]
    assert line == f"{trainer.as_text(last, 'test')} ({images} images)"
    if script == 'train.py':             # 45 images in batches of 22: rank 1 has no image of the last batch
        assert run_two_well(*command, '--batch_size', '22').splitlines()[-1] == line


def start_and_wait(logs, *command):
    """Starts two ranks with launch, -> Popen when rank 0 has printed step 2; launch itself prints a bit later."""
    job, path, deadline = launch(logs, *command), logs / 'workerlog.0', time.time() + 120
    while not path.exists() or 'epoch 1 step 2/' not in path.read_text():
        assert time.time() < deadline
        time.sleep(0.05)
    return job


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_one_process_resumes_it(tmp_path, recorded, commands):
    folder, uninterrupted = tmp_path / 'run', recorded('train_search.py')[0]
    command = [*commands['train_search.py'], '--model_save_dir', folder, '--report_freq', '1']
    job = start_and_wait(tmp_path / 'log', *command, '--save_freq', '1')
    children = (pid for task in Path(f'/proc/{job.pid}/task').glob('*/children') for pid in task.read_text().split())
    other = next(int(pid) for pid in children
                 if b'PADDLE_TRAINER_ID=1' in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'))
    os.kill(other, signal.SIGSTOP)                   # pauses both ranks, for less than gloo's timeout
    assert_one_line(run(*command, '--resume'), 'another run is active', str(folder))
    os.kill(other, signal.SIGKILL)
    killed = time.time()
    output = job.communicate(timeout=60)[0]
    assert time.time() - killed < 60 and job.returncode not in (0, None), output
    assert 'Traceback' not in output and 'another process of this run has ended' in (
        tmp_path / 'log' / 'workerlog.0').read_text()
    metadata = last_checkpoint(folder)[1]
    assert metadata['epoch'] + metadata['step'] > 0
    assert 'resumed from' in run_well(*command, '--resume')
    lines, expected = history(folder), history(uninterrupted)
    assert [line['epoch'] for line in lines] == [1, 2]
    # The images of each step are the same; normalisation by the batch of one rank instead of two differs.
    assert lines[-1]['train_loss'] == pytest.approx(expected[-1]['train_loss'], rel=0.02)
    assert checkpoint_names(folder)[-1] == checkpoint_names(uninterrupted)[-1]


@pytest.mark.slow
def test_sigterm_to_launch_stops_all_ranks_and_the_resumed_run_equals_uninterrupted(tmp_path, recorded, commands):
    folder, uninterrupted = tmp_path / 'run', recorded('train.py')[0]
    command = [*commands['train.py'], '--model_save_dir', folder]
    job = start_and_wait(tmp_path / 'log', *command, '--report_freq', '1')
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    logs = [(tmp_path / 'log' / f'workerlog.{rank}').read_text() for rank in range(2)]
    assert 'stopped after step' in logs[0] and not any('Traceback' in log for log in logs), output + ''.join(logs)
    metadata = last_checkpoint(folder)[1]
    assert metadata['epoch'] == 1 or metadata['step'] >= 2
    run_two_well(*command, '--resume')
    assert last_checkpoint(folder) == last_checkpoint(uninterrupted)
    assert without_seconds(folder) == without_seconds(uninterrupted)
    assert len(checkpoint_names(folder)) == 2


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_with_exit_codes_of_signals(tmp_path, commands):
    started = start_two(*commands['train.py'], '--model_save_dir', tmp_path / 'run', '--report_freq', '1')
    for line in started[0].stdout:
        if 'epoch 1 step 2/' in line:
            started[1].send_signal(signal.SIGINT)
    codes = [process.wait(timeout=60) for process in started]
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    assert last_checkpoint(tmp_path / 'run')[1]['step'] >= 2


@pytest.mark.slow
def test_an_error_of_rank_0_ends_both_ranks_with_one_line(tmp_path, commands):
    """The folder is in use by this process."""
    folder = tmp_path / 'run'
    holder = checkpoint.Run(argparse.Namespace(model_save_dir=str(folder), resume=False, visualdl=None))
    main, other = run_two(*commands['train.py'], '--model_save_dir', folder)
    assert holder and not checkpoint_names(folder)
    assert_one_line(main, 'another run is active in', '--model_save_dir')
    assert_one_line(other, 'another process of this run has ended')


# ---------------------------------------------------------------------------------------------------
# In this process

def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(distributed, 'world_size', 2)
    assert_one_line(run_in_process(*commands['train.py'], '--model_save_dir', tmp_path / 'run', '--batch_size', '9'),
                    '--batch_size 9', '2 processes', 'a multiple of 2')


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
@pytest.mark.parametrize('count', [24, 23, 17])
def test_the_shards_of_a_batch_make_up_the_batch_of_one_process(world_size, count):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 3, 32, 32), 'uint8'), np.arange(count)
    for settings in (dict(shuffle=True, augment=True, cutout_length=8), dict(shuffle=False)):
        complete, *shards = (reader.Batches(images, labels, 8, (0.5,) * 3, (0.25,) * 3, seed=0, shard=shard, **settings)
                             for shard in [(0, 1), *((rank, world_size) for rank in range(world_size))])
        for step in range(len(complete)):
            for draw in ('batch', 'random_batch'):
                batches = [getattr(shard, draw)(1, step) for shard in shards]
                for array, pieces in zip(getattr(complete, draw)(1, step), zip(*batches)):
                    assert np.array_equal(np.concatenate(pieces), array)


@pytest.mark.parametrize('augment', [True, False])
def test_the_shards_of_a_batch_of_image_files_make_up_the_batch_of_one_process(tmp_path, augment):
    pictures.make_imagenet(tmp_path, train=3, valid=1)
    samples = imagenet_reader.load(str(tmp_path), 3).train
    samples = imagenet_reader.Samples(samples.paths * 24, np.tile(samples.labels, 24))
    samples.paths[4] = str(tmp_path / 'missing.JPEG')            # in the second half of the first batch
    workers = Mock()
    workers.call.side_effect = lambda function, *arguments: function(*arguments)
    complete, *shards = (imagenet_reader.ImageBatches(samples, 5, workers, seed=0, shuffle=False, augment=augment,
                                                      shard=shard) for shard in ((0, 1), (0, 2), (1, 2)))
    for step in (0, 1, len(complete) - 1):                          # 216 images: the last batch has 1
        for array, pieces in zip(complete.batch(0, step), zip(*(shard.batch(0, step) for shard in shards))):
            assert np.array_equal(np.concatenate(pieces), array)
    decoded = [len(paths[part]) for _, paths, _, _, part in (call.args for call in workers.call.call_args_list)]
    assert decoded == [5, 2, 3, 5, 2, 3, 1, 0, 1]


def test_a_shard_without_a_readable_image_is_empty_in_the_validation(tmp_path):
    paths = [str(tmp_path / 'a'), str(tmp_path / 'b')]
    images, sources, unreadable = imagenet_reader.make_batch(paths, [0], False, slice(1, 2))
    assert images.shape == (0, 3, 224, 224) and not len(sources) and list(unreadable) == paths[1:]


@pytest.mark.parametrize('seen, outcome', [
    (20, pytest.raises(utils.UserError, match='2 of 100 ')), (60, contextlib.nullcontext())])
def test_more_than_one_per_cent_of_the_images_of_a_shard_stops_the_run(tmp_path, seen, outcome):
    pictures.make_imagenet(tmp_path, train=3, valid=1)
    paths = imagenet_reader.load(str(tmp_path), 3).train.paths
    samples = imagenet_reader.Samples((paths * 50)[:400], np.zeros(400, 'int64'))
    samples.paths[:2] = str(tmp_path / '0.JPEG'), str(tmp_path / '1.JPEG')
    batches = imagenet_reader.ImageBatches(samples, 4, Workers(0), seed=0, shuffle=False, augment=True,
                                           shard=(0, 4))
    batches.seen[:seen * 4] = True                                  # 80 or 240 of 400; an epoch of the shard has 100
    with outcome:
        batches._make(np.arange(8), [0])


def test_ranks_draw_different_masks_and_average_gradient_and_statistics(monkeypatch):
    average, training = Mock(), Mock(args=Mock(seed=3))
    training.network.run.return_value = 0, 0, 0
    monkeypatch.setattr(distributed, 'average_gradients', average)
    for rank in range(3):
        monkeypatch.setattr(distributed, 'rank', rank)
        monkeypatch.setattr(distributed, 'is_main', rank == 0)
        train.Training.train_step(training, ([0], [0]), 1, 2)
    assert [call.args for call in average.call_args_list] == [(training.store, 'gradient', 'statistics')] * 3
    seeds = [call.args[2] for call in training.network.run.call_args_list]
    assert len(set(seeds)) == 3
    assert seeds[0] == int(np.random.SeedSequence([3, reader.DROP_PATH, 1, 2]).generate_state(1)[0])


@pytest.mark.parametrize('launched', [False, True])
def test_repeated_signals_of_launch_do_not_end_the_process(monkeypatch, launched):
    handlers = []
    monkeypatch.setattr(distributed, 'barrier', lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr(distributed, 'launched', launched)
    before = signal.getsignal(signal.SIGTERM)
    with trainer._StopSignals() as signals:
        assert not signals.received()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received()
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is not launched
        for _ in range(3 * launched):
            os.kill(os.getpid(), signal.SIGTERM)
        # All ranks wait until rank 0 has saved, because launch ends the others when one has ended.
        with pytest.raises(SystemExit, match='143'):
            signals.exit('here')
        assert handlers == [signal.SIG_IGN if launched else signal.SIG_DFL]
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_tensor_of_a_collective_is_on_the_device_of_the_run(monkeypatch):
    """On a machine with GPUs eager statements use a GPU unless the device is given; here they would fail."""
    place, original, places = paddle.CPUPlace(), paddle.base.dygraph.guard, []

    def guard(device_of_run=None):
        assert device_of_run is place, "takes Paddle's default, which is a GPU wherever there is one"
        return original(device_of_run)

    def collective(tensor, **_):
        places.append(tensor.place)
        tensor.set_value(tensor + 1)
    monkeypatch.setattr(paddle.base.dygraph, 'guard', guard)
    for name in ('all_reduce', 'broadcast'):
        monkeypatch.setattr(paddle.distributed, name, collective)
    for name, value in (('world_size', 2), ('_place', place)):
        monkeypatch.setattr(distributed, name, value)
    store = VariableStore(place, 'float64')
    store.set('theta', [1.0, 3.0])
    store.set('d_alpha', [5.0])
    distributed.average_gradients(store, 'theta', 'd_alpha')
    assert store.get('theta').tolist() == [1.0, 2.0] and store.get('d_alpha').tolist() == [3.0]     # no copies
    assert distributed.all_reduce_mean([1.0, 2.0]) == [1.0, 1.5]
    assert distributed.broadcast({'state': np.array([1.5])})['state'].tolist() == [2.5]
    assert len(places) == 4 and all(each._equals(place) for each in places)


def test_connect_keeps_the_device_of_the_run(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, 'world_size', 2)
    monkeypatch.setattr(distributed, '_place', None)
    monkeypatch.setattr(paddle.distributed, 'init_parallel_env',
                        lambda: calls.append(os.environ['PADDLE_DISTRI_BACKEND']))
    monkeypatch.setenv('PADDLE_DISTRI_BACKEND', 'nccl')              # as launch sets it on a machine with GPUs
    place = paddle.CPUPlace()
    distributed.connect(place)
    assert calls == ['gloo'] and distributed._place is place and not paddle.in_dynamic_mode()


def test_the_gpu_is_the_one_that_launch_assigns(monkeypatch):
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    monkeypatch.setattr(paddle.device.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(paddle, 'CUDAPlace', lambda number: f'GPU {number}')
    assert device.find_place(None) == 'GPU 0'
    monkeypatch.setenv('FLAGS_selected_gpus', '2')
    assert device.find_place(None) == 'GPU 2' and isinstance(device.find_place(False), paddle.CPUPlace)
