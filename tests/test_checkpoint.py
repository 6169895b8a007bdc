"""The folder of a run: checkpoints and weight files (intact, damaged, of other versions), history, lock, full disks."""
import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest

import utils
from engine.checkpoint import Meter, Run, read_checkpoint, read_weights, write_arrays
from engine.console import log
from runs import assert_equal_runs, checkpoint_names, without_seconds
from tiny_runs import Crash, fake_run

METADATA = {'version': utils.VERSION, 'settings': {}, 'epoch': 0, 'step': 1, 'meter': vars(Meter())}


def open_run(folder, resume=False, **settings):
    return Run(Namespace(model_save_dir=str(folder), resume=resume, visualdl=None, **settings))


def task_with(**state):
    """A task of the given state that keeps what is loaded in `task.loaded`."""
    task = Namespace(steps=3)
    task.store = Namespace(state=lambda: state, load_state=lambda loaded: setattr(task, 'loaded', loaded))
    return task


def test_the_version_is_that_of_pyproject_toml(pytestconfig):
    assert f'\nversion = "{utils.VERSION}"\n' in (pytestconfig.rootpath / 'pyproject.toml').read_text()


def test_a_checkpoint_records_version_settings_and_position(tmp_path):
    open_run(tmp_path, batch_size=4, report_freq=7).save({'theta': np.arange(3.0)}, 1, 2, Meter(1.5, 2, 3, 4, 5.0))
    path = tmp_path / 'checkpoint-0001-000002.npz'
    metadata, state = read_checkpoint(path)
    assert metadata == {'version': utils.VERSION, 'settings': {'batch_size': 4}, 'epoch': 1, 'step': 2, 'meter': {
        'loss': 1.5, 'top1': 2, 'top5': 3, 'images': 4, 'seconds': 5.0}}
    assert state['theta'].tolist() == [0, 1, 2]
    write_arrays(path, dict(metadata, version=utils.VERSION + '9'), {})        # another patch version is read, too
    assert read_checkpoint(path)[0]['epoch'] == 1


@pytest.mark.parametrize('version', [None, '0.1', '0.3', '0.3.1', '1.2.0', '0', 2])
def test_a_checkpoint_of_another_version_is_refused_and_kept(tmp_path, version):
    metadata, path = dict(METADATA, version=version, additional=1), tmp_path / 'checkpoint-0000-000001.npz'
    if version is None:
        metadata.pop('version')
    write_arrays(path, metadata, {'theta': np.zeros(3)})
    message = f"was written by version {version or '0.1'} of this project, this is {utils.VERSION}"
    with pytest.raises(utils.UserError, match=re.escape(message)):
        open_run(tmp_path, resume=True).restore(task_with(theta=np.zeros(3)))
    assert checkpoint_names(tmp_path) == [path.name]                # not renamed to .damaged


def test_weight_files_of_version_0_1_are_read(tmp_path):
    """Plain numpy writes the file: its format is an .npz with the metadata as JSON in the entry 'about'."""
    metadata = {'genotype': None, 'dataset': 'cifar10', 'class_names': ['a', 'b'], 'mean': [0.5], 'std': [0.25]}
    np.savez(tmp_path / 'x.npz', **{'classifier.bias': np.arange(2, dtype='float32')},
             about=np.frombuffer(json.dumps(metadata).encode(), 'uint8'))
    found, weights = read_weights(tmp_path / 'x.npz')
    assert found == metadata and list(weights) == ['classifier.bias'] and weights['classifier.bias'].tolist() == [0, 1]
    write_arrays(tmp_path / 'new.npz', metadata, weights)                # the format is unchanged
    with np.load(tmp_path / 'x.npz') as old, np.load(tmp_path / 'new.npz') as new:
        assert old.files == new.files and all(np.array_equal(old[name], new[name]) for name in new.files)


def test_settings_and_the_state_of_the_folder_are_checked(tmp_path):
    open_run(tmp_path / 'run', batch_size=3, momentum=0.9, report_freq=1).save({}, 0, 0, Meter())
    with pytest.raises(utils.UserError, match=r'batch_size 3 there, 4 now; momentum 0.9 there, 0.5 now$'):
        open_run(tmp_path / 'run', True, batch_size=4, momentum=0.5).restore(task_with())
    open_run(tmp_path / 'run', True, batch_size=3, momentum=0.9, report_freq=2).restore(task_with())
    with pytest.raises(utils.UserError, match='already holds a run: continue it with --resume, or choose another'):
        open_run(tmp_path / 'run')
    for name in ('genotype.json', 'best.npz'):                      # drawn by --random; checkpoints removed by the user
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text('kept')
        with pytest.raises(utils.UserError, match=f'already holds {name}, which this run would overwrite: choose'):
            open_run(tmp_path / name[:4])
        assert (tmp_path / name[:4] / name).read_text() == 'kept'
    (tmp_path / 'file').write_text('')
    with pytest.raises(utils.UserError, match='cannot write to .*/file/run: Not a directory'):
        open_run(tmp_path / 'file' / 'run')


def test_a_damaged_checkpoint_is_renamed_and_the_one_before_is_used(tmp_path, capsys):
    folder = tmp_path / 'run'
    with pytest.raises(Crash):
        fake_run(folder, crash_after=7)
    fake_run(tmp_path / 'uninterrupted')
    path = folder / checkpoint_names(folder)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (folder / 'checkpoint-0000-000009.npz.part').write_bytes(b'half')
    with open(folder / 'history.jsonl', 'a') as file:
        file.write('{"epoch": 2, "lr": 0.0')                        # cut off by the crash
    assert fake_run(folder, resume=True) == 5                       # the second epoch
    output = capsys.readouterr().out
    assert f'{path} is damaged' in output and 'history.jsonl is damaged' not in output
    assert sorted(name for name in os.listdir(folder) if not name.endswith('.npz')) == [
        'args.json', path.name + '.damaged', 'history.jsonl', 'lock', 'log.txt']
    os.remove(f'{path}.damaged')
    assert_equal_runs(folder, tmp_path / 'uninterrupted')
    for name in checkpoint_names(folder):
        (folder / name).write_bytes(b'damaged')
    with pytest.raises(utils.UserError, match='none of the checkpoints in .* can be read'):
        fake_run(folder, resume=True)


@pytest.mark.parametrize('state', [{'theta': np.zeros(4)}, {}, {'theta': np.zeros(3), 'velocity': np.zeros(3)}])
def test_a_checkpoint_of_other_arrays_is_refused(tmp_path, state):
    open_run(tmp_path).save(state, 0, 0, Meter())
    with pytest.raises(utils.UserError, match='does not fit this network: it holds .*, expected {\'theta'):
        open_run(tmp_path, resume=True).restore(task_with(theta=np.zeros(3)))


INTACT = b'{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'


@pytest.mark.parametrize('damaged, kept', [
    (b'\xff\xfe\x00\n' + INTACT[13:26], INTACT[13:26]), (INTACT[13:], INTACT[13:]), (INTACT[:12] + b'x\n', b''),
    (INTACT[:-1], INTACT[:-13]), (None, b''),
    (INTACT + b'{"epoch": 4}\n{"epo', None)])                       # of a later epoch and cut off by a crash: no damage
def test_a_damaged_history_is_reported_and_the_run_continues(tmp_path, capsys, damaged, kept):
    run, task, path = open_run(tmp_path), task_with(theta=np.ones(3)), tmp_path / 'history.jsonl'
    run.save({'theta': np.zeros(3)}, 3, 1, Meter())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert run.restore(task)[:2] == (3, 1) and task.loaded['theta'].tolist() == [0, 0, 0]
    assert path.read_bytes() == (INTACT if kept is None else kept)
    assert (kept is None) != bool(re.search(r'history.jsonl is damaged: it has \d lines for the 3 epochs',
                                            capsys.readouterr().out))


def test_a_folder_with_an_active_run_is_refused(tmp_path):
    code = f"import fcntl; lock = open('{tmp_path}/lock', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        for resume in (False, True):
            with pytest.raises(utils.UserError, match='another run is active in .* --model_save_dir'):
                open_run(tmp_path, resume)
        process.stdin.close()
    open_run(tmp_path)


@pytest.mark.parametrize('name, write_it, message', [
    ('history.jsonl', lambda run: run.add_history({'epoch': 1}, {}), 'cannot write .*history.jsonl'),
    ('genotype.json.part', lambda run: run.write('genotype.json', 'x'), 'cannot write .*genotype.json'),
    ('checkpoint-0000-000001.npz.part', lambda run: run.save({}, 0, 1, Meter()), 'no checkpoint could be written to')])
def test_a_full_disk_ends_in_a_message(tmp_path, name, write_it, message):
    """Linux has a device on which there is never any space."""
    run, path = open_run(tmp_path), tmp_path / name
    run.save({}, 0, 0, Meter())
    path.unlink(missing_ok=True)
    path.symlink_to('/dev/full')
    with pytest.raises(utils.UserError, match=message + '.*: No space left on device; .* is intact'):
        write_it(run)
    assert path.is_symlink() == (name == 'history.jsonl')           # a .part would take up space
    assert read_checkpoint(tmp_path / 'checkpoint-0000-000000.npz') and len(checkpoint_names(tmp_path)) == 1


def test_a_disk_that_is_full_from_the_start(tmp_path):
    run = open_run(tmp_path)
    (tmp_path / 'checkpoint-0000-000000.npz.part').symlink_to('/dev/full')
    with pytest.raises(utils.UserError, match='No space left on device; there is no checkpoint yet: make space'):
        run.save({}, 0, 0, Meter())
    assert checkpoint_names(tmp_path) == []


def test_a_resume_without_a_checkpoint_starts_from_scratch(tmp_path, capsys):
    expected = tmp_path / 'expected'
    fake_run(expected)
    for folder in (tmp_path / 'new', tmp_path / 'empty'):
        if folder.name == 'empty':
            open_run(folder)                                        # killed before the first checkpoint
            subprocess.run(['rm', str(folder / 'lock')], check=True)
        assert fake_run(folder, resume=True) == 10
        assert f'--resume: there is no checkpoint in {folder}, so the run starts from' in capsys.readouterr().out
        assert_equal_runs(folder, expected)
        assert fake_run(folder, resume=True) == 0                   # the same command afterwards


def test_a_resume_with_more_epochs_continues_and_logs_the_new_end(tmp_path, capsys):
    def epochs_of(folder):
        return json.loads((folder / 'args.json').read_text())['epochs']

    folder = tmp_path / 'run'
    assert fake_run(folder) == 10 and epochs_of(folder) == 2
    assert fake_run(folder, resume=True, epochs=4) == 10 and epochs_of(folder) == 4
    assert '--epochs 4 instead of 2: the schedule ends later' in capsys.readouterr().out
    fake_run(tmp_path / 'longer', epochs=4)                         # its learning rate does not depend on the end
    assert without_seconds(folder) == without_seconds(tmp_path / 'longer')
    with pytest.raises(utils.UserError, match='epochs 4 there, 3 now'):
        fake_run(folder, resume=True, epochs=3)


def test_a_log_on_a_full_disk_loses_lines_only(tmp_path, capfd):
    (tmp_path / 'log.txt').symlink_to('/dev/full')
    open_run(tmp_path)
    log.info('a line')
    output = capfd.readouterr()
    assert output.out == 'a line\n' and output.err == ''


@pytest.mark.parametrize('old, new', [(b"'<f8'", b"'<f4'"), (b'(4000,)', b'(1000,)'), (b'False', b'True ')])
def test_an_altered_header_is_noticed_though_it_hides_the_end_of_the_array(tmp_path, old, new):
    path = tmp_path / 'x.npz'
    write_arrays(path, METADATA, {'theta': np.arange(4000.0)})
    content = path.read_bytes()
    assert read_checkpoint(path)[1]['theta'][-1] == 3999 and content.count(old)
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"the checksum of its entry 'theta.npy' is wrong"):
        read_checkpoint(path)


def test_an_npz_cannot_unpack_to_more_than_its_size(tmp_path):
    np.savez_compressed(tmp_path / 'x.npz', theta=np.zeros(1 << 20), about=np.frombuffer(b'{}', 'uint8'))
    with pytest.raises(utils.UserError, match='claims to be larger than the file'):
        read_weights(tmp_path / 'x.npz')


@pytest.mark.parametrize('change', [
    {'epoch': -1}, {'epoch': 1.5}, {'step': None}, {'step': True}, {'meter': {}}, {'meter': [1]}, {'settings': 'x'},
    {'meter': dict(vars(Meter()), loss='x')}, {'additional': 1}])
def test_metadata_that_are_not_those_of_a_checkpoint(tmp_path, change):
    write_arrays(tmp_path / 'x.npz', {**METADATA, **change}, {})
    with pytest.raises(ValueError, match='its metadata are (incomplete|not those of a checkpoint)'):
        read_checkpoint(tmp_path / 'x.npz')
