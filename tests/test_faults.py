"""What may happen in the hours of a run: kills, full disks, losses that are no numbers, damage of every kind."""
import argparse
import faulthandler
import json
import os
import re
import resource
import signal
import subprocess

import numpy as np
import pytest

import fuzz_readers
import kill_and_resume
import make_sample
import pictures
import reader
import train_search
from engine import checkpoint, trainer
import utils
from runs import assert_one_line, checkpoint_names, command, history, run, run_well
from test_train_search import Crash, tiny_search


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The part of the sample that the runs of kill_and_resume.py are on."""
    folder = tmp_path_factory.mktemp('data')
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(folder), train=kill_and_resume.IMAGES, test=2)
    return folder


@pytest.fixture(scope='module')
def whole(tmp_path_factory, data):
    """What an uninterrupted training of kill_and_resume.py leaves behind."""
    folder = tmp_path_factory.mktemp('whole')
    run_well(*small('train.py', data, folder))
    return kill_and_resume.end_of(folder)


def small(script, data, folder, *flags):
    """A small run as kill_and_resume.py does it, as arguments for the functions of runs.py."""
    return [script, *map(str, kill_and_resume.command(script, str(data), str(folder), *flags)[2:])]


def start_and_wait(text, script, *flags):
    """Starts a script, -> Popen, as soon as it prints `text`."""
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if text in line:
            return process
    raise AssertionError(process.communicate()[1])


def assert_ends_with_a_line(process, *reasons):
    """Exit code 2, and as the last line behind the progress bar one with the reasons."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and 'Traceback' not in said and 'Exception' not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith('error: ') and all(reason in last for reason in reasons), said
    return last


# ---------------------------------------------------------------------------------------------------
# Runs

def test_killed_at_random_moments_and_resumed_equals_uninterrupted():
    output = run_well('scripts/kill_and_resume.py', '--scripts', 'train.py', '--number', '2', '--jobs', '2')
    lines = output.splitlines()
    assert len(lines) == 4 and all(re.match(r'train.py +\d +epoch \d, .* equal$', line) for line in lines[1:3])
    assert 'writing checkpoint-' in lines[2]
    assert '2 equal to the uninterrupted run, 0 different' in lines[3]


@pytest.mark.parametrize('name', ['checkpoint-0003-000000.npz', 'last.npz', 'history.jsonl'])
def test_a_difference_at_the_end_is_noticed(tmp_path, whole, name):
    """The comparison of kill_and_resume.py can fail: by one number, or the number of lines."""
    if name == 'history.jsonl':
        other = dict(whole, **{name: whole[name][:-1]})
    else:
        about, arrays = whole[name]
        key = 'velocity' if 'velocity' in arrays else 'classifier.bias'
        kind, shape, content = arrays[key]
        changed = kind, shape, bytes([content[0] ^ 1]) + content[1:]
        other = dict(whole, **{name: (about, dict(arrays, **{key: changed}))})
    assert kill_and_resume.differences(whole, other) == [name]
    assert kill_and_resume.differences(whole, dict(whole)) == []
    assert {'history.jsonl', 'best.npz', 'last.npz', 'names of the files'} < set(whole)


def test_a_full_disk_ends_in_a_line_and_the_run_goes_on_from_the_checkpoint_before(tmp_path, data, whole):
    folder = tmp_path / 'run'
    process = start_and_wait('epoch 2 step 2/5', *small('train.py', data, folder))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))         # from now on no file grows beyond
    assert_ends_with_a_line(process, f'no checkpoint could be written to {folder}: File too large',
                            'the one before is intact')
    assert not [name for name in os.listdir(folder) if name.endswith('.part')]     # it would take up space
    names = checkpoint_names(folder)
    assert len(names) == 2 and all(checkpoint.read_checkpoint(folder / name) for name in names)
    run_well(*small('train.py', data, folder, '--resume'))
    assert kill_and_resume.end_of(folder) == whole


@pytest.mark.parametrize('name', ['history.jsonl', 'genotype.json.part', 'log.txt'])
def test_whichever_file_finds_the_disk_full(tmp_path, monkeypatch, capfd, name):
    """Linux has a device on which there is never any space."""
    begin = trainer._begin

    def begin_and_fill(*args):
        result = begin(*args)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to('/dev/full')
        return result

    if name == 'log.txt':                      # costs lines of the log and nothing else
        (tmp_path / name).symlink_to('/dev/full')
        assert tiny_search(tmp_path, epochs=1) == 3
    else:
        monkeypatch.setattr(trainer, '_begin', begin_and_fill)
        with pytest.raises(utils.UserError, match='(cannot write|could be written).*No space left.* is intact'):
            tiny_search(tmp_path, epochs=1)
        assert not (tmp_path / name).is_symlink() or name == 'history.jsonl'
    assert 'Traceback' not in ''.join(capfd.readouterr())


def test_ctrl_c_ends_with_130_and_another_run_in_the_folder_is_refused(tmp_path, data):
    folder = tmp_path / 'run'
    process = start_and_wait('epoch 1 step 1/5', *small('train.py', data, folder))
    process.send_signal(signal.SIGSTOP)        # it holds still
    for flags in ([], ['--resume']):
        assert_one_line(run(*small('train.py', data, folder, *flags)), f'another run is at work in {folder}')
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output, said = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in said
    stopped = re.search(r'stopped after step (\d) of epoch (\d); --resume continues from here', output)
    assert checkpoint_names(folder)[-1] == f'checkpoint-{int(stopped[2]) - 1:04d}-{int(stopped[1]):06d}.npz'


@pytest.mark.parametrize('script', kill_and_resume.SCRIPTS)
def test_a_loss_that_is_no_number_names_step_learning_rate_and_the_last_good_checkpoint(tmp_path, data, script):
    done = run(*small(script, data, tmp_path / 'run', '--learning_rate', '1e30', '--grad_clip', '1e30'))
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    found = re.search(r'(the loss is (nan|-?inf) at|not all numbers are finite after) step (\d) of epoch 1, '
                      r'learning rate 1e\+30; the last good checkpoint is (.*\.npz)$', last)
    about, state = checkpoint.read_checkpoint(found[4])
    assert (about['epoch'], about['step']) == (0, int(found[3]) - 1)
    assert all(np.isfinite(array).all() for array in state.values())


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(tmp_path, monkeypatch):
    """The loss of a step is that of the weights before it: it may still be finite."""
    take_step = train_search.Search.train_step

    def overflowing_step(self, batch, epoch, step):
        result = take_step(self, batch, epoch, step)
        if step == 2:                          # the last one of the epoch, before weights and genotype are written
            self.supernet.store.set('theta', np.full_like(self.supernet.store.get('theta'), np.inf))
        return result

    monkeypatch.setattr(train_search.Search, 'train_step', overflowing_step)
    with pytest.raises(utils.UserError, match=r'theta: not all numbers are finite after step 3 of epoch 1, learning '
                                              r'rate 0.025; the last good checkpoint is .*0000-000002.npz'):
        tiny_search(tmp_path)
    assert checkpoint_names(tmp_path)[-1] == 'checkpoint-0000-000002.npz' and not (tmp_path / 'genotype.json').exists()


def test_what_a_crash_leaves_lying_about_is_cleared_and_damage_is_kept_apart(tmp_path, capsys):
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=5)
    newest = checkpoint_names(tmp_path)[-1]
    (tmp_path / newest).write_bytes(b'damaged')
    (tmp_path / 'checkpoint-0000-000009.npz.part').write_bytes(b'half')
    with open(tmp_path / 'history.jsonl', 'a') as file:
        file.write('{"epoch": 2, "lr": 0.0')                 # without the end of the line
    assert tiny_search(tmp_path, resume=True) == 3
    # It would be one of the last two for long.
    assert (tmp_path / (newest + '.damaged')).read_bytes() == b'damaged'
    assert not (tmp_path / 'checkpoint-0000-000009.npz.part').exists()
    assert [line['epoch'] for line in history(tmp_path)] == [1, 2]
    assert 'history.jsonl is damaged' not in capsys.readouterr().out           # what was cut off was the rest


@pytest.mark.parametrize('damage', [lambda lines: [b'\xff\xfe\x00', lines[1]], lambda lines: lines[1:],
                                    lambda lines: [lines[0] + b'x'], lambda lines: None])
def test_a_damaged_history_is_said_and_the_run_goes_on(tmp_path, capsys, damage):
    folder = checkpoint.Run(argparse.Namespace(model_save_dir=str(tmp_path), resume=False, visualdl=None))
    folder.save({'theta': np.zeros(3)}, 3, 1, checkpoint.Meter())
    lines = [json.dumps({'epoch': epoch}).encode() for epoch in (1, 2, 3, 4)]
    whole, path = b'\n'.join(lines[:3]) + b'\n', tmp_path / 'history.jsonl'
    task = argparse.Namespace(state=lambda: {'theta': np.ones(3)}, load_state=lambda state: None)
    path.write_bytes(b'\n'.join(lines))                      # the last one cut off: to be done again
    assert folder.restore(task)[:2] == (3, 1) and path.read_bytes() == whole
    assert 'is damaged' not in capsys.readouterr().out
    damaged = damage(lines)
    path.unlink() if damaged is None else path.write_bytes(b'\n'.join(damaged) + b'\n')
    assert folder.restore(task)[:2] == (3, 1)
    assert re.search(r'history.jsonl is damaged: it has \d lines for the 3 epochs', capsys.readouterr().out)
    kept = path.read_bytes()
    assert all(line in lines[:3] for line in kept.split(b'\n')[:-1]) and (not kept or kept.endswith(b'\n'))


def test_a_worker_process_that_is_killed_ends_the_training_with_its_reason(tmp_path):
    pictures.make_imagenet(tmp_path / 'imagenet')
    process = start_and_wait('epoch 1 step 1/', 'train_imagenet.py', '--data_dir', tmp_path / 'imagenet', '--class_num',
                             3, '--batch_size', 8, '--init_channels', 4, '--layers', 3, '--use_gpu', 'False',
                             '--num_workers', 2, '--report_freq', 1, '--epochs', 50,
                             '--model_save_dir', tmp_path / 'run')
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    assert_ends_with_a_line(process, 'a worker process that decodes pictures died (signal SIGKILL)', '--resume')


# ---------------------------------------------------------------------------------------------------
# Readers

def test_damaged_files_of_every_format_end_in_an_error_or_a_right_result():
    lines = run_well('scripts/fuzz_readers.py', '--count', '100').splitlines()
    for reader_name in ('checkpoint (.npz)', 'weights (.npz), inside', 'genotype.json', 'history.jsonl',
                        'list of ImageNet', 'archive of CIFAR-10', 'file of CIFAR-10: data_batch_1',
                        'Fashion-MNIST: train-images-idx3-ubyte.gz', 'picture: JPEG', 'picture: PNG'):
        assert any(line.startswith(reader_name + ' ') for line in lines), reader_name
    for line in lines[1:-1]:
        *_, inputs, errors, equal, different, failures = line.split()
        assert failures == '0' and int(inputs) == int(errors) + int(equal) + int(different.replace('-', '0'))


def crash():
    faulthandler.disable()                     # it would tell of this one
    os.kill(os.getpid(), signal.SIGSEGV)


def take_memory():
    return len(np.ones(120 << 20))             # 960 MB: the process may have some left of what it freed


def spin():
    while True:
        pass


def fail():
    return {}['absent']


@pytest.mark.parametrize('fault, reason', [
    (crash, 'SIGSEGV'), (take_memory, r'it took \d+ MB'), (fail, 'KeyError'), (spin, 'it hung'),
    (lambda: 'another', 'a wrong result'), (lambda: os._exit(3), 'it ended the process')])
def test_the_fuzzer_notices_what_a_reader_must_not_do(tmp_path, monkeypatch, fault, reason):
    path, said = tmp_path / 'file', []
    monkeypatch.setattr(fuzz_readers, 'MOST_MEMORY', 256)
    monkeypatch.setattr(fuzz_readers, 'MOST_SECONDS', 0.5 if fault is spin else 5)

    def read():
        content = path.read_bytes()
        if len(content) < 20:                  # some of the inputs that are cut off
            return fault()
        if content != b'0' * 99:
            raise utils.UserError("it is damaged")
        return len(content)

    subject = fuzz_readers.Subject('a reader', path, b'0' * 99, read, True, fuzz_readers.as_is)
    result = fuzz_readers.examine(subject, 40, 0, said.append)
    assert 0 < result.failures == len(said) < 15 and result.errors > 20
    assert re.search(f'a reader, input .*{reason}', said[0])
    assert path.read_bytes() == subject.content


@pytest.mark.parametrize('old, new', [(b"'<f8'", b"'<f4'"), (b'(4000,)', b'(1000,)'), (b'False', b'True ')])
def test_an_altered_header_is_noticed_though_it_hides_what_the_checksum_is_of(tmp_path, old, new):
    path = tmp_path / 'checkpoint.npz'
    about = {'settings': {}, 'epoch': 0, 'step': 1, 'meter': vars(checkpoint.Meter())}
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, about, {'theta': np.arange(4000.0)})
    content = path.read_bytes()
    assert checkpoint.read_checkpoint(path)[1]['theta'][-1] == 3999 and content.count(old)
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"checksum of 'theta.npy' in it is wrong"):
        checkpoint.read_checkpoint(path)


def test_an_npz_cannot_unpack_to_more_than_it_is(tmp_path):
    np.savez_compressed(tmp_path / 'x.npz', theta=np.zeros(1 << 20), about=np.frombuffer(b'{}', 'uint8'))
    with pytest.raises(utils.UserError, match='claims to be larger than the file'):
        checkpoint.read_weights(tmp_path / 'x.npz')


@pytest.mark.parametrize('change', [
    {'epoch': -1}, {'epoch': 1.5}, {'step': None}, {'meter': {}}, {'meter': [1]}, {'settings': 'x'},
    {'meter': dict(vars(checkpoint.Meter()), loss='x')}])
def test_a_description_that_is_none_of_a_checkpoint(tmp_path, change):
    about = {'settings': {}, 'epoch': 0, 'step': 1, 'meter': vars(checkpoint.Meter()), **change}
    with open(tmp_path / 'x.npz', 'wb') as file:
        checkpoint.write_arrays(file, about, {})
    with pytest.raises(ValueError, match='its description is not that of a checkpoint'):
        checkpoint.read_checkpoint(tmp_path / 'x.npz')


def test_a_checkpoint_of_other_arrays_is_refused(tmp_path):
    with pytest.raises(Crash):
        tiny_search(tmp_path, crash_after=1)
    name, = checkpoint_names(tmp_path)
    about, state = checkpoint.read_checkpoint(tmp_path / name)
    for changed in (dict(state, theta=state['theta'][1:]), {key: state[key] for key in state if key != 'velocity'}):
        with open(tmp_path / name, 'wb') as file:
            checkpoint.write_arrays(file, about, changed)
        with pytest.raises(utils.UserError, match='is from another version of this program'):
            tiny_search(tmp_path, resume=True)
