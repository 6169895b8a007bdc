"""Faults of runs in real processes that are killed, damaged files, and the fuzzer that writes them."""
import faulthandler
import os
import re
import signal
import subprocess

import numpy as np
import pytest

import fuzz_readers
import kill_and_resume
import pictures
import utils
from engine import checkpoint
from runs import command, output_of, run_well
from tiny_runs import fake_run


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted():
    output = run_well('scripts/dev/kill_and_resume.py', '--scripts', 'train.py', '--number', '2', '--jobs', '2')
    lines = output.splitlines()
    assert len(lines) == 4 and all(re.match(r'train.py +\d +epoch \d, .* equal$', line) for line in lines[1:3])
    assert 'writing checkpoint-' in lines[2]
    assert '2 runs equal to the uninterrupted one, 0 different' in lines[3]


def test_kill_and_resume_notices_any_difference(tmp_path):
    fake_run(tmp_path)
    checkpoint.write_arrays(tmp_path / 'last.npz', {}, {'theta': np.ones(3)})
    results = kill_and_resume.results_of(tmp_path)
    for name in ('checkpoint-0002-000000.npz', 'last.npz'):
        metadata, arrays = results[name]
        dtype, shape, content = arrays['theta']
        changed = dict(arrays, theta=(dtype, shape, bytes([content[0] ^ 1]) + content[1:]))
        assert kill_and_resume.differences(results, dict(results, **{name: (metadata, changed)})) == [name]
    shorter = dict(results, **{'history.jsonl': results['history.jsonl'][:-1]})
    assert kill_and_resume.differences(results, shorter) == ['history.jsonl']
    assert kill_and_resume.differences(results, dict(results)) == [] and 'last.npz' in results['names of the files']


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_training_with_a_reason(tmp_path):
    pictures.make_imagenet(tmp_path / 'imagenet')
    arguments = command('train_imagenet.py', '--data_dir', tmp_path / 'imagenet', '--class_num', 3, '--batch_size', 8,
                        '--init_channels', 4, '--layers', 3, '--use_gpu', 'False', '--num_workers', 2,
                        '--report_freq', 1, '--epochs', 50, '--model_save_dir', tmp_path / 'run')
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any('epoch 1 step 1/' in line for line in process.stdout), process.stderr.read()
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and 'Traceback' not in error and 'Exception' not in error, error
    assert re.search(r'\nerror: .*a worker process.*signal SIGKILL.*--resume.*\s*$', error), error


def test_damaged_checkpoints_end_in_an_error_or_the_right_arrays():
    output = output_of('scripts/dev/fuzz_readers.py', '--count', 100, '--only', 'checkpoint (')
    checksummed, inside = (list(map(int, re.search(re.escape(name) + r' +(\d+)' * 5, output).groups()))
                           for name in ('checkpoint (.npz)', 'checkpoint (.npz), inside'))
    assert checksummed[0] == sum(checksummed[1:]) == 100 and checksummed[1] > 90 and checksummed[3:] == [0, 0]
    assert inside[3] > 15 and inside[4] == 0                         # well-formed files with other arrays


@pytest.mark.paddle_free                    # in many processes, so on one version
@pytest.mark.parametrize('count', [1, pytest.param(50, marks=pytest.mark.slow)])
def test_damaged_files_of_every_format_end_in_an_error_or_a_right_result(count):
    output = run_well('scripts/dev/fuzz_readers.py', '--count', str(count))
    for name in ('checkpoint (.npz)', 'weights (.npz), inside', 'checkpoint of a supernet (.npz)', 'genotype.json',
                 'history.jsonl', 'list of ImageNet', 'Fashion-MNIST: train-images-idx3-ubyte.gz', 'genotype as text',
                 'custom arrays (.npz), inside', 'folder: train and val', 'folder: class folders', 'image: PPM',
                 'image: JPEG', 'image: PNG', 'sum'):
        assert re.search(f'^{re.escape(name)} .* 0$', output, re.M), output      # no failures


def crash():
    faulthandler.disable()                     # it would report this crash
    os.kill(os.getpid(), signal.SIGSEGV)


def spin():
    while True:
        pass


@pytest.mark.parametrize('fault, reason', [
    (crash, 'it crashed with SIGSEGV'), (lambda: os._exit(3), 'it ended the process'), (lambda: {}['x'], 'KeyError'),
    (lambda: 'another', 'a wrong result'),
    (lambda: b'\xff'.decode(), 'UnicodeDecodeError'),
    pytest.param(lambda: len(np.ones(120 << 20)), r'it took \d+ MB', marks=pytest.mark.slow),      # 960 MB
    pytest.param(spin, 'it took more than 0.5 s', marks=pytest.mark.slow)])
def test_the_fuzzer_notices_a_faulty_reader(tmp_path, monkeypatch, fault, reason):
    path, lines = tmp_path / 'file', []
    monkeypatch.setattr(fuzz_readers, 'MAX_MEMORY', 256)
    monkeypatch.setattr(fuzz_readers, 'MAX_SECONDS', 0.5 if fault is spin else 5)

    def read():
        content = path.read_bytes()
        if len(content) < 20:                  # some of the inputs whose end is missing
            return fault()
        if content != b'0' * 99:
            raise utils.UserError("it is damaged")
        return len(content)

    subject = fuzz_readers.Subject('a reader', path, b'0' * 99, read, checksum=True)
    if 'MB' in reason:                             # 1 GB of free memory that the process still holds
        blocks = [np.ones(12000) for _ in range(11000)]
        kept, blocks = blocks[-100:], None         # noqa: F841
    counts = fuzz_readers.examine(subject, 40, 0, lines.append)
    assert 0 < counts['failures'] == len(lines) < 15 and counts['errors'] > 20 and sum(counts.values()) == 40
    assert re.search(f'a reader, input .*{reason}', lines[0])
    assert path.read_bytes() == subject.content
