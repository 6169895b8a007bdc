"""The search as its user runs it: on the sample data, interrupted and resumed, and with bad input."""
import json
import re

import numpy as np
import pytest

import genotypes
import make_sample
import reader
import train_search
from engine import checkpoint, trainer
import utils
from model_search import Supernet
from runs import (assert_one_line, last_checkpoint, checkpoint_names, history, run, run_well, stop_at,
                  without_seconds)

SMALL = ['--dataset', 'fashion_mnist_sample', '--init_channels', '2', '--layers', '3', '--batch_size', '10',
         '--use_gpu', 'False']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with the first 24 training images of each class of the sample: 12 steps an epoch."""
    folder = tmp_path_factory.mktemp('data')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(folder), train=24, test=5)
    return folder


def command(folder, *flags):
    return ['train_search.py', *SMALL, '--model_save_dir', folder, *flags]


@pytest.fixture(scope='module')
def second_order(tmp_path_factory, data):
    """A finished second-order search on the sample, -> (folder, what it printed)."""
    folder = tmp_path_factory.mktemp('run') / 'search'
    return folder, run_well(*command(folder, '--data', data, '--epochs', '2', '--report_freq', '4'))


def test_the_loss_falls_and_the_search_writes_what_it_found(second_order):
    folder, _ = second_order
    first, last = history(folder)
    assert last['train_loss'] < first['train_loss'] - 0.05
    assert [first['epoch'], last['epoch']] == [1, 2] and first['lr'] == 0.025
    assert last['lr'] == pytest.approx(0.001 + 0.024 / 2)
    for kind in ('normal', 'reduce'):
        weights = np.array(last[f'alphas_{kind}'])
        assert weights.shape == (14, 8) and np.allclose(weights.sum(axis=1), 1)
        assert not np.array_equal(weights, first[f'alphas_{kind}'])
    genotype = genotypes.load(str(folder / 'genotype.json'))
    assert genotypes.check(last['genotype']) == genotype
    args = json.loads((folder / 'args.json').read_text())
    assert (args['batch_size'], args['momentum'], args['unrolled'], args['class_num']) == (10, 0.9, True, 10)
    assert 'epoch 2 step 12/12' in (folder / 'log.txt').read_text()


def test_what_it_prints(second_order):
    _, output = second_order
    lines = output.splitlines()
    assert re.fullmatch(r'device: CPU \(\d+ cores\), Paddle \d+\.\d+\.\d+', lines[0])
    assert re.fullmatch(r'param size = 0\.\d{6}MB', lines[1])
    assert re.fullmatch(r'graph ready in \d+\.\d s \(\d+ operators\)', lines[2])
    assert re.search(r'epoch 1 step 8/12: loss \d\.\d{4}, top-1 .* %, top-5 .* %, lr 0\.025', output)
    for expected in ('softmax of alphas_normal', 'softmax of alphas_reduce', 'dil_conv_5x5', 'genotype = Genotype(',
                     'validation loss', 'waiting for input'):
        assert expected in output


def test_first_order(tmp_path, data, second_order):
    run_well(*command(tmp_path / 'search', '--data', data, '--epochs', '2', '--unrolled', 'False'))
    first, last = history(tmp_path / 'search')
    assert last['train_loss'] < first['train_loss'] - 0.05
    # The same images and initial weights, another gradient of alpha.
    assert first['alphas_normal'] != history(second_order[0])[0]['alphas_normal']


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(tmp_path, data, second_order):
    uninterrupted, _ = second_order
    folder = tmp_path / 'search'
    flags = ['--data', data, '--epochs', '2']
    stop_at('epoch 1 step 5/12', *command(folder, *flags, '--report_freq', '5'))
    stopped_at = last_checkpoint(folder)[1]
    assert stopped_at['epoch'] == 0 and 5 <= stopped_at['step'] < 12
    run_well(*command(folder, *flags, '--resume', '--num_workers', '0'))
    assert last_checkpoint(folder) == last_checkpoint(uninterrupted)
    assert without_seconds(folder) == without_seconds(uninterrupted)


class Crash(Exception):
    pass


def tiny_search(folder, resume=False, crash_after=None, **changes):
    """A search of two epochs with three steps each on 18 random images, in this process."""
    flags = ['--model_save_dir', str(folder), '--epochs', '2', '--batch_size', '3', '--init_channels', '2',
             '--layers', '3', '--save_freq', '2', '--use_gpu', 'False'] + ['--resume'] * resume
    for name, value in changes.items():
        flags += [f'--{name}', str(value)]
    args = train_search.parse_args(flags)
    args.class_num = 10
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (18, 3, 32, 32), 'uint8'), np.arange(18) % 10
    data = reader.Dataset('random', 10, tuple('0123456789'), images, labels, images, labels,
                          np.full(3, 0.5, 'float32'), np.full(3, 0.25, 'float32'))
    folder = checkpoint.Run(args)
    task = train_search.Search(args, data, folder, utils.find_place(False))
    take_step, done = task.train_step, []

    def crashing_step(batch, epoch, step):
        if len(done) == crash_after:
            raise Crash
        done.append(None)
        return take_step(batch, epoch, step)

    task.train_step = crashing_step
    trainer.run_epochs(task, folder, args)
    return len(done)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an uninterrupted tiny_search."""
    folder = tmp_path_factory.mktemp('whole')
    assert tiny_search(folder) == 6
    return folder


@pytest.mark.parametrize('crash_after', [0, 1, 2, 3, 5])       # at a boundary of epochs: 0 and 3
def test_resumed_after_a_crash_equals_uninterrupted(tmp_path, whole, crash_after):
    broken = tmp_path / 'broken'
    with pytest.raises(Crash):
        tiny_search(broken, crash_after=crash_after)
    # Checkpoints stand before step 1, after 2 and at the end of the epoch.
    assert tiny_search(broken, resume=True) == 6 - {0: 0, 1: 0, 2: 2, 3: 3, 5: 5}[crash_after]
    assert last_checkpoint(broken) == last_checkpoint(whole)
    assert without_seconds(broken) == without_seconds(whole)
    assert len(checkpoint_names(broken)) == 2


def test_a_search_can_start_with_the_weights_and_alphas_of_another(tmp_path, data):
    supernet = Supernet(2, 10, 3, seed=5, build_programs=False)
    given = dict(supernet.weights(), **supernet.alphas())
    with open(tmp_path / 'given.npz', 'wb') as file:
        checkpoint.write_arrays(file, {}, given)
    run_well(*command(tmp_path / 'search', '--data', data, '--epochs', '1', '--unrolled', 'False', '--momentum', '0',
                      '--learning_rate', '1e-12', '--learning_rate_min', '0', '--arch_learning_rate', '0',
                      '--pretrained', tmp_path / 'given.npz'))
    _, state = checkpoint.read_checkpoint(str(tmp_path / 'search' / checkpoint_names(tmp_path / 'search')[-1]))
    assert np.array_equal(state['alphas'], [given['alphas_normal'], given['alphas_reduce']])
    assert np.allclose(state['theta'], supernet.store.get('theta'), atol=1e-9)
    assert_one_line(run(*command(tmp_path / 'other', '--init_channels', '4', '--pretrained', tmp_path / 'given.npz')),
                    'weight', 'has shape')


def test_a_seed_repeats_itself_and_another_does_not(tmp_path, whole):
    for seed in (0, 1):
        tiny_search(tmp_path / str(seed), seed=seed)
    assert last_checkpoint(tmp_path / '0') == last_checkpoint(whole)
    assert last_checkpoint(tmp_path / '1')[2]['alphas'] != last_checkpoint(whole)[2]['alphas']


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, whole, capsys):
    folder = tmp_path / 'damaged'
    with pytest.raises(Crash):
        tiny_search(folder, crash_after=5)
    names = checkpoint_names(folder)
    content = bytearray((folder / names[-1]).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / names[-1]).write_bytes(content)
    assert tiny_search(folder, resume=True) == 3
    assert f'{names[-1]} is damaged' in capsys.readouterr().out
    assert last_checkpoint(folder) == last_checkpoint(whole)
    assert tiny_search(folder, resume=True) == 0
    assert 'epochs were done already' in capsys.readouterr().out
    assert last_checkpoint(folder) == last_checkpoint(whole)

    for name in checkpoint_names(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(utils.UserError, match='none of the checkpoints'):
        tiny_search(folder, resume=True)


def test_a_checkpoint_of_another_configuration_is_refused_with_the_differences(tmp_path):
    with pytest.raises(Crash):
        tiny_search(tmp_path / 'run', crash_after=1)
    with pytest.raises(utils.UserError, match=r'batch_size 3 there, 4 now; momentum 0.9 there, 0.5 now'):
        tiny_search(tmp_path / 'run', resume=True, batch_size=4, momentum=0.5)
    with pytest.raises(utils.UserError, match='holds a run already'):
        tiny_search(tmp_path / 'run')
    with pytest.raises(utils.UserError, match='no checkpoint'):
        tiny_search(tmp_path / 'other', resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(utils.UserError, match=r'loss is (nan|inf) at step \d of epoch \d.*last good checkpoint'):
        tiny_search(tmp_path / 'run', learning_rate=1e30, unrolled=False, grad_clip=1e30)


@pytest.mark.parametrize('flags, reason', [
    (['--dataset', 'imagenet'], "argument --dataset: invalid choice: 'imagenet'"),
    (['--batch_size', '0'], 'argument --batch_size'),
    (['--batch_size', 'many'], 'argument --batch_size'),
    (['--learning_rate', 'nan'], 'argument --learning_rate'),
    (['--epochs', '-1'], 'argument --epochs'),
    (['--unrolled', 'maybe'], "argument --unrolled: 'maybe' is neither True nor False"),
    (['--train_portion', '1.5'], 'argument --train_portion'),
    (['--layers', '2'], 'layers is 2'),
    (['--init_channels', '5'], 'init_channels is 5'),
    (['--class_num', '7'], '--class_num 7: fashion_mnist_sample has 10 classes'),
    (['--batch_size', '5000'], '5000'),
    (['--data', 'nowhere', '--dataset', 'fashion_mnist_sample'], 'nowhere'),
    (['--resume'], 'no checkpoint in'),
])
def test_bad_input_ends_in_one_line(tmp_path, flags, reason):
    assert_one_line(run(*command(tmp_path / 'search', *flags)), reason)


def test_a_gpu_that_is_not_there_is_said(tmp_path):
    import paddle
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip('there is a GPU')
    assert_one_line(run(*command(tmp_path / 'search', '--use_gpu', 'True')), 'finds no GPU')


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / 'file').write_text('')
    assert_one_line(run(*command(tmp_path / 'file' / 'search')), 'cannot write to')


def test_no_damage_to_a_checkpoint_goes_unseen(tmp_path):
    """Cut off or with a bit flipped anywhere: refused, or (in a field of zip without meaning) the same arrays."""
    rng = np.random.default_rng(0)
    state = {'theta': rng.normal(size=50), 'alphas': rng.normal(size=(2, 14, 8)), 'adam_steps': np.array(3)}
    about = {'settings': {}, 'epoch': 0, 'step': 1, 'meter': vars(checkpoint.Meter())}
    path = tmp_path / 'checkpoint.npz'
    np.savez(path, **state, about=np.frombuffer(json.dumps(about).encode(), 'uint8'))
    original, refused = path.read_bytes(), 0
    for number in range(600):
        content = bytearray(original)
        if number % 4:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        else:
            content = content[:rng.integers(len(content))]
        path.write_bytes(content)
        try:
            read, arrays = checkpoint.read_checkpoint(str(path))
        except ValueError:
            refused += 1
            continue
        assert read == about and set(arrays) == set(state)
        assert all(np.array_equal(arrays[name], state[name]) for name in state)
    assert refused > 450
