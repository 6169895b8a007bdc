"""Two processes on the CPU: the same state on both after every step, averages of what each computes, any number of
processes after a resumption, and an end that all of them take together."""
import argparse
import os
import signal
import time

import numpy as np
import pytest

import averaged
from engine import distributed
import genotypes
import imagenet_reader
import make_sample
import pictures
import reader
import train
from engine import checkpoint, trainer
from model import NetworkCIFAR
from model_search import Supernet
from runs import (assert_one_line, last_checkpoint, checkpoint_names, history, launch, run, run_two, run_two_well, run_well,
                  start_two, stop_at, without_seconds)

SMALL = ['--layers', '3', '--use_gpu', 'False', '--epochs', '2']


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    """{script: its command without the folder of the run}: 10, 20 and 3 steps an epoch, odd numbers of test images."""
    sample, imagenet = tmp_path_factory.mktemp('sample'), tmp_path_factory.mktemp('imagenet')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(sample), train=12, test=5)
    for name, count, header in (('t10k-images-idx3-ubyte.gz', 45, 3), ('t10k-labels-idx1-ubyte.gz', 45, 1)):
        array = reader.read_idx(str(sample / name), header)
        make_sample.write_idx(str(sample / name), array[:count])
    pictures.make_imagenet(imagenet, train=8, valid=5)
    data = ['--dataset', 'fashion_mnist_sample', '--data', sample, '--init_channels', '2', '--batch_size', 6, *SMALL]
    return {
        'train_search.py': ['train_search.py', *data],
        'train.py': ['train.py', *data, '--save_freq', '5'],
        'train_imagenet.py': ['train_imagenet.py', '--data_dir', imagenet, '--class_num', '3', '--batch_size', '8',
                              '--init_channels', '4', '--learning_rate', '0.005', '--drop_path_prob', '0.1',
                              '--num_workers', '1', *SMALL]}


@pytest.fixture(scope='module')
def recorded(tmp_path_factory, commands):
    """A function script -> (folder, states of both ranks, what was printed) of a finished run of two processes.

    That of train_imagenet.py was begun by one process.
    """
    done = {}

    def of(script):
        if script not in done:
            folder = tmp_path_factory.mktemp('two') / 'run'
            command = [*commands[script], '--model_save_dir', folder, '--report_freq', '1']
            if script == 'train_imagenet.py':
                stop_at('epoch 1 step 2/', *command)
                command.append('--resume')
            output = run_two_well('tests/recorded.py', folder.parent / 'states', *command)
            states = []
            for rank in range(2):
                with np.load(folder.parent / f'states.{rank}.npz') as arrays:
                    states.append({name: arrays[name] for name in arrays.files})
            done[script] = folder, states, output
        return done[script]
    return of


SCRIPTS = pytest.mark.parametrize('script', ['train_search.py', 'train.py', 'train_imagenet.py'])


@SCRIPTS
def test_after_every_step_both_processes_have_the_same_state(recorded, script):
    _, (ours, theirs), output = recorded(script)
    assert ours.keys() == theirs.keys()
    names = {name.split('/')[-1] for name in ours}
    assert {'theta', 'velocity', 'gradient'} < names
    assert ({'alphas', 'adam_mean', 'd_alpha'} if script == 'train_search.py' else {'statistics'}) < names
    assert len({name.rpartition('/')[0] for name in ours}) >= 3
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    assert ', 2 processes' in output.splitlines()[0]


@SCRIPTS
def test_a_step_sends_each_gradient_that_is_needed_once(recorded, script):
    """Three times the weights in a second-order step, once in a step of a training; alpha and statistics are small."""
    _, (states, _), _ = recorded(script)
    step = min(states).rpartition('/')[0]
    size = {name: states[f'{step}/{name}'].nbytes for name in ('theta', 'd_alpha', 'statistics')
            if f'{step}/{name}' in states}
    expected = ([size['theta'], size['theta'], size['d_alpha'], size['theta']] if script == 'train_search.py' else
                [size['theta'], size['statistics']])
    assert states[f'{step}/sent'].tolist() == expected


def shards(data, shard, **settings):
    """The training batches of train.py and train_search.py, a part of each."""
    return reader.Batches(data.train_images, data.train_labels, mean=data.mean, std=data.std, seed=0, shuffle=True,
                          augment=True, cutout_length=16, drop_last=True, shard=shard, **settings)


def assert_near(found, expected):
    """To what single precision gives, by the size of the whole vector."""
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_gradient_of_the_search_is_the_mean_of_both_parts(recorded, commands):
    _, (states, _), _ = recorded('train_search.py')
    data = reader.load('fashion_mnist_sample', str(commands['train_search.py'][4]))
    chosen, _ = reader.split(len(data.train_images), 0.5, 0)
    data = data._replace(train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])
    net = Supernet(2, 10, 3, seed=0)               # the weights of the first step: alpha has been moved, they have not
    net.store.set('alphas', states['0/0/alphas'])
    gradients = []
    for rank in range(2):
        net.run(net.feed(*shards(data, (rank, 2), batch_size=6).batch(0, 0)))
        gradients.append(net.store.get('gradient'))
    assert_near(states['0/0/gradient'], np.mean(gradients, axis=0))
    assert np.abs(gradients[0] - gradients[1]).max() > 0.1 * np.abs(gradients[0]).max()


def test_gradient_and_statistics_of_a_training_are_the_means_of_both_parts(recorded, commands):
    _, (states, _), _ = recorded('train.py')
    data = reader.load('fashion_mnist_sample', str(commands['train.py'][4]))
    results = []
    for rank in range(2):
        net = NetworkCIFAR(genotypes.DARTS_PADDLE, 2, 10, 3, auxiliary=0.4, seed=0)
        net.run(net.feed(*shards(data, (rank, 2), batch_size=6).batch(0, 0)))
        results.append([net.store.get(name) for name in ('gradient', 'statistics')])
    for found, (first, second) in zip((states['0/0/gradient'], states['0/0/statistics']), zip(*results)):
        assert_near(found, (first + second) / 2)
        assert np.abs(first - second).max() > 0.01 * np.abs(first).max()


def test_second_order_over_two_processes_is_that_of_the_mean_losses(tmp_path):
    """Steps 1 to 6 by hand, in float64, with the mean of both parts wherever a gradient stands."""
    done = run_two('tests/averaged.py', tmp_path / 'result')
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    found = [dict(np.load(tmp_path / f'result.{rank}.npz')) for rank in range(2)]
    net = averaged.supernet()
    w, v, xi = net.store.get('theta'), averaged.velocity(net), averaged.LR
    parts = [averaged.batches(rank, 2) for rank in range(2)]

    def gradients(theta, number):
        net.store.set('theta', theta)
        both = []
        for part in parts:
            net.run(net.feed(*part[number]))
            both.append([net.store.get('gradient'), net.store.get('alpha_gradient')])
        return [np.mean(each, axis=0) for each in zip(*both)]

    g, _ = gradients(w, 0)
    u, outer = gradients(w - xi * (averaged.MOMENTUM * v + g + averaged.WEIGHT_DECAY * w), 1)
    eps = 0.01 / np.linalg.norm(u)
    h = (gradients(w + eps * u, 0)[1] - gradients(w - eps * u, 0)[1]) / (2 * eps)
    expected = {'True': outer - xi * h, 'False': gradients(w, 1)[1]}
    for name, array in expected.items():
        assert np.abs(found[0][name] - array).max() < 1e-9 * np.abs(array).max()
    for name in found[0]:
        assert found[0][name].tobytes() == found[1][name].tobytes()
    assert np.abs(xi * h).max() > 1e-3 * np.abs(outer).max()


@SCRIPTS
def test_it_learns_and_reports_what_all_processes_saw(recorded, script):
    folder, _, _ = recorded(script)
    lines = history(folder)
    assert [line['epoch'] for line in lines] == [1, 2]
    images = {'train_search.py': 60, 'train.py': 120, 'train_imagenet.py': 24}[script]
    tests = {'train_search.py': 60, 'train.py': 45, 'train_imagenet.py': 15}[script]
    for line in lines:
        assert np.isfinite(line['train_loss']) and np.isfinite(line['valid_loss'])
        assert line['train_top1'] * images == pytest.approx(round(line['train_top1'] * images), abs=1e-6)
        assert line['valid_top1'] * tests == pytest.approx(round(line['valid_top1'] * tests), abs=1e-6)


@pytest.mark.parametrize('script', ['train.py', 'train_imagenet.py'])
def test_an_evaluation_counts_every_image_once(recorded, commands, script):
    """By two processes at the end of the training, and by one and by two afterwards; an odd number of images."""
    folder, _, _ = recorded(script)
    command = [*commands[script], '--eval_only', '--pretrained', folder / 'last.npz']
    alone, last = run_well(*command).splitlines()[-1], history(folder)[-1]
    assert alone.endswith({'train.py': '(45 images)', 'train_imagenet.py': '(15 images)'}[script])
    assert alone.startswith(f"loss {last['valid_loss']:.4f}, top-1 {100 * last['valid_top1']:.2f} %, "
                            f"top-5 {100 * last['valid_top5']:.2f} %")
    if script == 'train.py':             # 45 images in batches of 22: of the last one there is nothing for one process
        assert run_two_well(*command, '--batch_size', '22').splitlines()[-1] == alone


def test_a_job_ends_with_one_of_its_processes_and_goes_on_with_one(tmp_path, recorded, commands):
    folder = tmp_path / 'run'
    command = [*commands['train_search.py'], '--model_save_dir', folder, '--report_freq', '1']
    job = launch(tmp_path / 'log', *command, '--save_freq', '1')
    other = process_of(job.pid, 'PADDLE_TRAINER_ID=1')
    wait_for('epoch 1 step 2/', tmp_path / 'log')
    os.kill(other, signal.SIGSTOP)                   # the job holds still, for less than gloo's patience
    assert_one_line(run(*command, '--resume'), 'another run is at work', str(folder))
    os.kill(other, signal.SIGKILL)
    killed = time.time()
    output = job.communicate(timeout=60)[0]
    assert time.time() - killed < 60 and job.returncode not in (0, None), output
    assert 'Traceback' not in output and 'another process of this run has ended' in (
        tmp_path / 'log' / 'workerlog.0').read_text()
    # One process goes on with what two had computed, to the end.
    stopped = last_checkpoint(folder)[1]
    assert stopped['epoch'] + stopped['step'] > 0
    assert 'resumed from' in run_well(*command, '--resume')
    ours, theirs = history(folder), history(recorded('train_search.py')[0])
    assert [line['epoch'] for line in ours] == [1, 2]
    # The same images in the same steps; only what a batch is normalised by differs.
    assert ours[-1]['train_loss'] == pytest.approx(theirs[-1]['train_loss'], rel=0.02)
    assert last_checkpoint(folder)[0] == last_checkpoint(recorded('train_search.py')[0])[0]


def wait_for(text, logs):
    """Until the main process has printed a text; launch itself looks for that every second or two."""
    path, deadline = logs / 'workerlog.0', time.time() + 120
    while not path.exists() or text not in path.read_text():
        assert time.time() < deadline, path.read_text()
        time.sleep(0.05)


def process_of(launcher, variable):
    """The child that launch will have started with this in its environment."""
    deadline = time.time() + 60
    while time.time() < deadline:
        for pid in filter(str.isdecimal, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/stat') as stat, open(f'/proc/{pid}/environ', 'rb') as environment:
                    parent = int(stat.read().rpartition(')')[2].split()[1])
                    if parent == launcher and variable.encode() in environment.read().split(b'\0'):
                        return int(pid)
            except OSError:
                pass                     # it has ended
        time.sleep(0.1)
    raise AssertionError(f"launch has no process with {variable}")


def test_sigterm_to_launch_ends_all_after_the_same_step_and_a_resumed_run_equals_uninterrupted(tmp_path, recorded,
                                                                                              commands):
    folder, uninterrupted = tmp_path / 'run', recorded('train.py')[0]
    command = [*commands['train.py'], '--model_save_dir', folder]
    job = launch(tmp_path / 'log', *command, '--report_freq', '1')
    wait_for('epoch 1 step 2/', tmp_path / 'log')
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    logs = [(tmp_path / 'log' / f'workerlog.{rank}').read_text() for rank in range(2)]
    assert 'stopped after step' in logs[0] and not any('Traceback' in log for log in logs), output + ''.join(logs)
    stopped = last_checkpoint(folder)[1]
    assert stopped['epoch'] == 1 or stopped['step'] >= 2
    run_two_well(*command, '--resume')
    assert last_checkpoint(folder) == last_checkpoint(uninterrupted)
    assert without_seconds(folder) == without_seconds(uninterrupted)
    assert len(checkpoint_names(folder)) == 2


def test_a_signal_to_one_process_ends_all_with_its_exit_code(tmp_path, commands):
    started = start_two(*commands['train.py'], '--model_save_dir', tmp_path / 'run', '--report_freq', '1')
    for line in started[0].stdout:
        if 'epoch 1 step 2/' in line:
            started[1].send_signal(signal.SIGINT)
    codes = [process.wait(timeout=60) for process in started]
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    assert last_checkpoint(tmp_path / 'run')[1]['step'] >= 2


def test_a_folder_in_use_is_refused_to_a_run_of_two(tmp_path, commands):
    folder = tmp_path / 'run'
    holder = checkpoint.Run(argparse.Namespace(model_save_dir=str(folder), resume=False, visualdl=None))
    main, other = run_two(*commands['train.py'], '--model_save_dir', folder)
    assert holder and not checkpoint_names(folder)
    assert_one_line(main, 'another run is at work in', '--model_save_dir')
    assert_one_line(other, 'another process of this run has ended')


def test_a_batch_that_cannot_be_divided_is_said(tmp_path, commands):
    for done in run_two(*commands['train.py'], '--model_save_dir', tmp_path / 'run', '--batch_size', '9'):
        assert_one_line(done, '--batch_size 9', '2 processes')


# ---------------------------------------------------------------------------------------------------
# In this process

@pytest.mark.parametrize('parts', [1, 2, 3, 8])
@pytest.mark.parametrize('count', [24, 23, 17])
def test_parts_of_a_batch_are_the_batch_of_one_process(parts, count):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 3, 32, 32), 'uint8'), np.arange(count)
    for settings in (dict(shuffle=True, augment=True, cutout_length=8), dict(shuffle=False)):
        whole, *made = (reader.Batches(images, labels, 8, (0.5,) * 3, (0.25,) * 3, seed=0, shard=shard, **settings)
                        for shard in [(0, 1), *((number, parts) for number in range(parts))])
        for step in range(len(whole)):
            for draw in ('batch', 'random_batch'):
                expected = getattr(whole, draw)(1, step)
                for array, pieces in zip(expected, zip(*(getattr(each, draw)(1, step) for each in made))):
                    assert np.array_equal(np.concatenate(pieces), array)


@pytest.mark.parametrize('augment', [True, False])
def test_parts_of_a_batch_of_pictures_are_the_batch_of_one_process(tmp_path, augment):
    pictures.make_imagenet(tmp_path, train=3, valid=1)
    samples = imagenet_reader.load(str(tmp_path), 3).train
    samples = imagenet_reader.Samples(samples.paths * 24, np.tile(samples.labels, 24))
    samples.paths[4] = str(tmp_path / 'missing.JPEG')            # in the second half of the first batch
    decoded = []

    class Workers:
        def call(self, function, paths, key, augment, mine):
            decoded.append(len(range(len(paths))[mine]))
            return function(paths, key, augment, mine)

    whole, *made = (imagenet_reader.ImageBatches(samples, 5, Workers(), seed=0, shuffle=False, augment=augment,
                                                 shard=shard) for shard in ((0, 1), (0, 2), (1, 2)))
    for step in (0, 1, len(whole) - 1):                          # 216 pictures: the last batch has 1
        images, labels = whole.batch(0, step)
        pieces = [each.batch(0, step) for each in made]
        assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), images)
        assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), labels)
    assert decoded == [5, 2, 3, 5, 2, 3, 1, 0, 1]


def test_a_part_without_a_readable_picture_is_empty_in_the_validation(tmp_path):
    paths = [str(tmp_path / 'a'), str(tmp_path / 'b')]
    images, sources, bad = imagenet_reader.make_batch(paths, [0], False, slice(1, 2))
    assert images.shape == (0, 3, 224, 224) and not len(sources) and list(bad) == paths[1:]


@pytest.mark.parametrize('seen, refused', [(20, True), (60, False)])
def test_more_than_one_per_cent_of_what_a_process_looked_at_stops_the_run(tmp_path, seen, refused):
    pictures.make_imagenet(tmp_path, train=3, valid=1)
    paths = imagenet_reader.load(str(tmp_path), 3).train.paths
    samples = imagenet_reader.Samples((paths * 50)[:400], np.zeros(400, 'int64'))
    for number in (0, 1):
        samples.paths[number] = str(tmp_path / f'{number}.JPEG')
    made = imagenet_reader.ImageBatches(samples, 4, imagenet_reader.Workers(0), seed=0, shuffle=False, augment=True,
                                        shard=(0, 4))
    made.seen[:seen * 4] = True                                  # 80 and 240 of 400; an epoch shows 100
    if refused:
        with pytest.raises(trainer.UserError, match='2 of 100 pictures'):
            made._make(np.arange(8), [0])
    else:
        made._make(np.arange(8), [0])


def test_masks_of_drop_path_differ_between_processes(monkeypatch):
    seeds = []
    network = type('Network', (), {'feed': lambda self, *batch: None, 'store': None,
                                   'run': lambda self, feed, prob, seed: seeds.append(seed) or (0, 0, 0)})()
    args = argparse.Namespace(seed=3, drop_path_prob=0.2, epochs=4)
    training = train.Training.__new__(train.Training)
    training.args, training.network, training.learning_rate = args, network, lambda epoch: 0
    training.optimizer = type('SGD', (), {'step': lambda self, lr: None})()
    for rank in range(3):
        monkeypatch.setattr(distributed, 'rank', rank)
        monkeypatch.setattr(distributed, 'is_main', rank == 0)
        training.train_step(([0], [0]), 1, 2)
    assert len(set(seeds)) == 3
    assert seeds[0] == int(np.random.SeedSequence([3, reader.DROP_PATH, 1, 2]).generate_state(1)[0])


def test_what_launch_repeats_is_no_second_signal(monkeypatch):
    waited = []
    monkeypatch.setattr(distributed, 'barrier', lambda: waited.append(signal.getsignal(signal.SIGTERM)))
    for launched in (False, True):
        monkeypatch.setattr(distributed, 'launched', launched)
        with trainer._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wanted()
            assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is not launched
            if launched:
                for _ in range(3):
                    os.kill(os.getpid(), signal.SIGTERM)
            # Nobody leaves before the main process has saved: launch ends those that are left.
            with pytest.raises(SystemExit, match='143'):
                stop.exit('here')
            assert waited.pop() == (signal.SIG_IGN if launched else signal.SIG_DFL) and not waited


def test_the_gpu_is_the_one_that_launch_gives(monkeypatch):
    import paddle
    import utils
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    monkeypatch.setattr(paddle.device.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(paddle, 'CUDAPlace', lambda number: f'GPU {number}')
    assert utils.find_place(None) == 'GPU 0'
    monkeypatch.setenv('FLAGS_selected_gpus', '2')
    assert utils.find_place(None) == 'GPU 2' and isinstance(utils.find_place(False), paddle.CPUPlace)
