"""scripts/gpu_check.sh: its table, failures, and the pytest option --use_gpu. Nothing here runs on a GPU."""
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = ['numeric proof of the second order', 'operations and networks against the reference',
        'search (train_search.py)', 'training (train.py)', 'training (train_imagenet.py)',
        'determinism of two searches', 'determinism of two trainings',
        'for information: two searches without --deterministic', 'search on two ranks with launch',
        'time of a search step, second order', 'time of a search step, first order', 'time of a training step']

# Takes the place of Python. It stands for a machine with GPUs, on which two processes fail, one blocks, and the memory
# is short at a batch of 64 and 32.
STUB = r'''#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
*"gpu_check.py device"*) printf 'a warning\ndevice: two stubs\nGPUs: 3; driver: none\n' ;;
-m\ pytest*) echo "3 passed, 2 skipped in 1.00s" ;;
train_imagenet.py*) printf 'step 1\nerror: no | memory\nthe last line\n' >&2; exit 2 ;;
train.py*/train-2*) exec sleep 60 ;;
train*) mkdir "$3"; echo "epoch 1: validation loss 2.5, top-1 10.00 %, peak memory 1.00 GB" > "$3/log.txt" ;;
*compare*) echo "result: theta bit-identical" ;;
*second_order*"--batch_size 64"* | *second_order*"--batch_size 32"*) echo "error: short of memory"; exit 3 ;;
*first_order*) printf 'Traceback\n  File\nRuntimeError: something\n\n'; exit 1 ;;
*_order* | *training_step*) echo "result: 1 s" ;;
esac
'''


def gpu_check(*arguments, script='scripts/gpu_check.sh', **environment):
    return subprocess.run(['bash', script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'VENV': sys.prefix, **environment})


def rows_of(folder):
    """Returns {check: (result, seconds)} of the table."""
    lines = (folder / 'table.md').read_text().split('| --- | --- | --- |\n')[1].splitlines()
    return {name: (result, float(seconds)) for name, result, seconds in (
        line.strip('| ').rsplit(' | ', 2) for line in lines)}


@pytest.fixture
def stub(tmp_path):
    """Returns a function that runs the script with STUB in place of Python, at most 2 s per process."""
    python = tmp_path / 'bin' / 'python'
    python.parent.mkdir()
    python.write_text(STUB)
    python.chmod(0o755)
    # `timeout` with another limit: the script comes first in PATH.
    timeout = python.with_name('timeout')
    timeout.write_text('#!/bin/sh\nshift 4\nexec /usr/bin/timeout --foreground -k 1 2 "$@"\n')
    timeout.chmod(0o755)

    def run(*arguments, **environment):
        return gpu_check(*arguments, '--out', tmp_path / 'out', VENV=str(tmp_path), CALLS=str(tmp_path / 'calls'),
                         PATH=f"{python.parent}:{os.environ['PATH']}", **environment)
    return run


@pytest.mark.paddle_free
def test_a_failed_check_is_reported_and_the_others_follow(stub, tmp_path):
    done = stub(CUDA_VISIBLE_DEVICES='4,7,8')
    rows, calls = rows_of(tmp_path / 'out'), (tmp_path / 'calls').read_text().splitlines()
    assert done.returncode == 1 and list(rows) == ROWS, done.stdout + done.stderr
    out = tmp_path / 'out'
    results = [result for result, _ in rows.values()]
    assert results == [
        'ok, 3 passed', 'ok, 3 passed', 'ok, validation loss 2.5, top-1 10.00 %, peak memory 1.00 GB',
        'ok, validation loss 2.5, top-1 10.00 %, peak memory 1.00 GB',
        f'FAILED: no \\| memory (log: {out}/train_imagenet.log)', 'theta bit-identical',
        f'FAILED: a process did not end within 900 s (log: {out}/train_again.log)', 'theta bit-identical',
        'theta bit-identical', '1 s', f'FAILED: RuntimeError: something (log: {out}/first_order.log)', '1 s']
    assert 'step 1' in (out / 'train_imagenet.log').read_text()
    assert done.stdout.endswith((out / 'table.md').read_text() + f'\n{done.stdout.splitlines()[-1]}\n')
    assert done.stdout.splitlines()[-1].startswith('gpu_check: 3 of 12 checks failed, in ')
    assert (out / 'table.md').read_text().startswith('device: two stubs\nGPUs: 3; driver: none\n\n| check |')
    for number, name in enumerate(ROWS, 1):
        assert f'[{number}/12] {name} ... ' in done.stdout
    batches = [call.split('--batch_size ')[1].split()[0] for call in calls if 'second_order' in call]
    assert batches == ['64', '32', '16']
    assert any('launch --gpus 4,7 ' in call for call in calls)
    assert not done.stderr, done.stderr


@pytest.mark.parametrize('arguments, environment, line', [
    ((), {'CUDA_VISIBLE_DEVICES': ''}, 'gpu_check: no GPU to check: .*; --use_gpu False runs the checks on the CPU'),
    ((), {'VENV': 'missing'}, 'gpu_check: missing/bin/python is missing: bash scripts/setup.sh creates .venv, .*'),
    (('--use_gpu', 'no'), {}, 'gpu_check: --use_gpu no: it is True or False'),
    (('--use_gpu',), {}, 'gpu_check: --use_gpu needs a value'),
    (('--cpu',), {}, 'gpu_check: unknown argument --cpu: .*')])
def test_one_line_when_no_check_can_run(tmp_path, arguments, environment, line):
    done = gpu_check(*(('--out', tmp_path / 'out') + arguments), **environment)
    assert (done.returncode, done.stdout) == (2, ''), done.stdout
    assert re.fullmatch(line, done.stderr.strip()), done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.paddle_free                    # in minutes, so on one version
def test_all_checks_on_the_cpu(tmp_path):
    done = gpu_check('--use_gpu', 'False', '--quick', '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / 'out')
    assert list(rows) == ROWS
    for name, (result, seconds) in rows.items():
        expected = (r'[\d.]+ s at C \d, 3 cells, batch 8 \(median of 3\); peak .*, estimate of the tensors 0.0\d GB'
                    if name.startswith('time') else
                    r'(alphas, |statistics, )theta, velocity bit-identical \(\d+ arrays\)'
                    if name.startswith(('det', 'for')) or 'ranks' in name else
                    r'ok, \d+ passed' if 'numeric' in name or 'reference' in name else
                    r'ok, (test|validation) loss [\d.]+, top-1 [\d.]+ %, peak memory [\d.]+ GB')
        assert re.fullmatch(expected, result), (name, result)
        assert 0 < seconds < 120
    assert done.stdout.startswith('device: CPU (')


# ---------------------------------------------------------------------------------------------------
# gpu_check.py

def compare(tmp_path, *flags):
    return subprocess.run([sys.executable, ROOT / 'scripts/gpu_check.py', 'compare', tmp_path / 'a.npz',
                           tmp_path / 'b', *flags], capture_output=True, text=True)


@pytest.mark.paddle_free
def test_runs_are_compared_bitwise(tmp_path):
    arrays = {'theta': np.array([1.0, -2.0], 'float32'), 'alphas': np.zeros(3), 'about': np.zeros(1)}
    (tmp_path / 'b').mkdir()
    np.savez(tmp_path / 'a.npz', **arrays)
    np.savez(tmp_path / 'b' / 'checkpoint-0000-00000.npz', theta=np.ones(1))
    np.savez(tmp_path / 'b' / 'checkpoint-0001-00000.npz', **dict(arrays, about=np.ones(1)))
    assert compare(tmp_path).stdout == 'result: alphas, theta bit-identical (2 arrays)\n'
    np.savez(tmp_path / 'b' / 'checkpoint-0001-00000.npz', **dict(arrays, theta=np.array([1.0, -2.01], 'float32')))
    done = compare(tmp_path)
    assert done.returncode == 2 and done.stderr == (
        'error: 1 of 2 arrays differ: theta by 5.0e-03 of its largest value\n')
    done = compare(tmp_path, '--only_report')
    assert (done.returncode, done.stdout) == (
        0, 'result: 1 of 2 arrays differ: theta by 5.0e-03 of its largest value\n')
    np.savez(tmp_path / 'b' / 'checkpoint-0001-00000.npz', theta=arrays['theta'])
    assert compare(tmp_path, '--only_report').stderr == 'error: not the same arrays: alphas\n'


def test_lack_of_memory_has_its_exit_code(monkeypatch):
    """The phrase in the message of engine.device is what scripts/gpu_check.py looks for."""
    import gpu_check as module
    from engine import device
    from utils import UserError

    def fail(args):
        raise UserError(device.explain('ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate'))
    monkeypatch.setitem(module.TASKS, 'second_order', fail)
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', 'second_order'])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == module.SHORT_OF_MEMORY == 3


# ---------------------------------------------------------------------------------------------------
# pytest --use_gpu True, with a class of places that Paddle treats as the CPU in place of the GPU's

@pytest.fixture
def sentinel(monkeypatch):
    import paddle

    from engine import device

    class Sentinel(paddle.CPUPlace):
        def __init__(self, number):
            super().__init__()

    monkeypatch.setattr(paddle, 'CUDAPlace', Sentinel)
    monkeypatch.setattr(device, 'gpu_count', lambda: 1)
    monkeypatch.setattr(paddle, 'set_flags', lambda flags: None)          # a CPU build lacks those of cuDNN
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')
    return Sentinel


def test_stores_without_a_place_or_with_the_cpu_get_the_gpu(sentinel, monkeypatch):
    import conftest
    import paddle

    from engine.programs import VariableStore
    from genotypes import SearchSpace, named
    from model import NetworkCIFAR
    from model_search import Supernet
    from reference import discrete

    places, guard = [], paddle.base.dygraph.guard
    monkeypatch.setattr(paddle.base.dygraph, 'guard', lambda place=None: places.append(place) or guard(place))
    conftest.compute_on_gpu(monkeypatch)
    supernet = Supernet(2, 5, 3, 'float64', image_size=8, space=SearchSpace(('skip_connect', 'max_pool_3x3'), 1))
    network = NetworkCIFAR(named()['DARTS_V2'], 2, 5, 3, build_programs=False)
    for store in (supernet.store, network.store, VariableStore(paddle.CPUPlace(), 'float64')):
        assert isinstance(store.place, sentinel)
    assert isinstance(supernet._run._executor.place, sentinel)
    rng = np.random.default_rng(0)
    assert np.isfinite(supernet.gradients(rng.normal(size=(2, 3, 8, 8)), np.array([0, 1])).loss)

    # The running variance of the reference is the unbiased estimate, as that of cuDNN.
    weights = {'edge.op.1.weight': np.ones((2, 1, 3, 3)), 'edge.op.2.weight': np.ones((2, 2, 1, 1)),
               'edge.op.3.weight': np.ones(2), 'edge.op.3.bias': np.zeros(2), 'edge.op.3.running_mean': np.zeros(2),
               'edge.op.3.running_var': np.array([3.0, 4.0])}
    seen, norm = [], discrete.Pass.norm
    monkeypatch.setattr(discrete.Pass, 'norm', lambda self, x, name: seen.append(x.numpy()) or norm(self, x, name))
    result = discrete.edge(weights, 'dil_conv_3x3', rng.normal(size=(2, 2, 4, 4)), np.ones((2, 2, 4, 4)), 1, True)
    expected = 0.9 * np.array([3.0, 4.0]) + 0.1 * seen[0].var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(result.statistics['edge.op.3.running_var'], expected, rtol=1e-6)
    assert [type(place) for place in places] == [paddle.CPUPlace]          # of the reference


def test_the_option_of_pytest(tmp_path):
    """Programs of the selected tests are compiled for the GPU, and compiled operators are skipped."""
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent('''
        import engine, paddle, pytest, sys
        from engine import device, programs
        class Sentinel(paddle.CPUPlace):
            def __init__(self, number):
                super().__init__()
        places, init = set(), programs.StaticProgram.__init__
        def recording(program, store, build):
            places.add(type(store.place).__name__)
            init(program, store, build)
        programs.StaticProgram.__init__ = recording
        if sys.argv[1] == 'sentinel':
            paddle.CUDAPlace, paddle.set_flags, device.gpu_count = Sentinel, lambda flags: None, lambda: 1
        code = pytest.main(['-p', 'no:cacheprovider', '--use_gpu', 'True', '-k', 'seed_alone or custom_ops-1_node',
                            'tests/test_operations.py', 'tests/test_model_search.py'])
        print(places)
        sys.exit(code)
    '''))

    def run(argument):
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT))
        return subprocess.run([sys.executable, script, argument], cwd=ROOT, capture_output=True, text=True,
                              env=environment)
    done = run('sentinel')
    assert done.returncode == 0 and '1 passed, 1 skipped' in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "{'Sentinel'}"
    done = run('none')
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and '--use_gpu True: ' in done.stderr, done.stdout
