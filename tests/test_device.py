"""The device: choice, first contact, flags, log lines, errors of GPUs; and what keeps a GPU fast and repeatable.

No GPU is needed: what a CPU build of Paddle lacks is replaced, and the messages are those that users have reported.
"""
import contextlib
import io
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import engine
import genotypes
from architect import Architect
from engine import device, distributed, memory
from engine.memory import Operation
from engine.optimizers import MomentumSGD
from engine.programs import StaticProgram, VariableStore
from model import NetworkCIFAR
from model_search import Supernet
from runs import ROOT
from utils import UserError


class FakeGPU:
    """Takes the place of paddle.CUDAPlace, which a CPU build cannot create."""

    def __init__(self, number=0):
        self.number = number

    def get_device_id(self):
        return self.number


@pytest.fixture
def gpu_build(monkeypatch):
    """Makes this Paddle look like a build for GPUs; returns a function that sets the number of GPUs."""
    def set_count(count):
        monkeypatch.setattr(paddle.device.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    monkeypatch.setattr(paddle, 'CUDAPlace', FakeGPU)
    set_count(1)
    return set_count


@pytest.fixture
def with_driver(monkeypatch, tmp_path):
    """Makes this machine look like one with the driver of NVIDIA."""
    (tmp_path / 'version').write_text('NVRM version')
    monkeypatch.setattr(device, 'DRIVER', str(tmp_path / 'version'))


def announced(caplog, *args):
    with caplog.at_level(logging.INFO, 'darts'):
        device.announce(*args)
    return caplog.messages[-1]


# ---------------------------------------------------------------------------------------------------
# Choice and log

def test_a_gpu_that_is_requested_and_missing_is_explained(monkeypatch, gpu_build):
    gpu_build(0)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert isinstance(device.find_place(None), paddle.CPUPlace)
    with pytest.raises(UserError, match="--use_gpu True: .* because CUDA_VISIBLE_DEVICES is ''; without the flag"):
        device.find_place(True)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    with pytest.raises(UserError, match='because the driver of NVIDIA is not loaded'):
        device.find_place(True)
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: False)
    with pytest.raises(UserError, match='build of Paddle [0-9.]+ for the CPU; without'):
        device.find_place(True)


def test_a_cpu_that_is_used_in_spite_of_a_gpu_is_explained(monkeypatch, caplog, gpu_build, with_driver):
    cpu = paddle.CPUPlace()
    assert 'because of --use_gpu False, Paddle' in announced(caplog, cpu, False)
    gpu_build(0)
    assert 'the driver of NVIDIA is loaded: see nvidia-smi' in announced(caplog, cpu, None)
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: False)
    assert 'but the machine has the driver of NVIDIA: bash scripts/setup.sh' in announced(caplog, cpu, None)


def test_the_log_of_a_cpu_build_without_a_driver_needs_no_reason(caplog, monkeypatch):
    monkeypatch.setattr(device, 'DRIVER', '/nonexistent')
    assert 'because' not in announced(caplog, paddle.CPUPlace(), None)
    assert announced(caplog, paddle.CPUPlace(), None, 2).endswith(f'Paddle {paddle.__version__}, 2 processes')


@pytest.mark.parametrize('cudnn, text', [(90501, 'cuDNN 9.5.1'), (8600, 'cuDNN 8.6.0'), (None, 'cuDNN is missing')])
def test_the_log_describes_a_gpu(monkeypatch, caplog, gpu_build, cudnn, text):
    properties = SimpleNamespace(name='NVIDIA A100-SXM4-40GB', major=8, minor=0, total_memory=42_400_000_000)
    monkeypatch.setattr(paddle.device.cuda, 'get_device_properties', lambda number: properties)
    monkeypatch.setattr(paddle, 'get_cudnn_version', lambda: cudnn)
    monkeypatch.setattr(paddle.version, 'cuda', lambda: '12.6')
    monkeypatch.setenv('NVIDIA_TF32_OVERRIDE', '0')
    assert announced(caplog, FakeGPU(2), None) == (
        f"device: GPU 2 (NVIDIA A100-SXM4-40GB, compute capability 8.0, 42.4 GB), CUDA 12.6, {text}, TF32 off, "
        f"Paddle {paddle.__version__}")
    monkeypatch.setenv('NVIDIA_TF32_OVERRIDE', '1')
    assert 'TF32 not off (NVIDIA_TF32_OVERRIDE=1)' in announced(caplog, FakeGPU(2), None)


def test_tf32_is_off_unless_the_user_sets_it():
    code = "import os, engine; print(os.environ['NVIDIA_TF32_OVERRIDE'])"
    environment = {name: value for name, value in os.environ.items() if name != 'NVIDIA_TF32_OVERRIDE'}
    found = [subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**environment, **values},
                            capture_output=True, text=True).stdout.strip()
             for values in ({}, {'NVIDIA_TF32_OVERRIDE': '1'})]
    assert found == ['0', '1']


@pytest.mark.parametrize('vendor, flags, given, expected', [
    ('AuthenticAMD', 'sse2 fma avx avx2', None, '5'), ('HygonGenuine', 'fma avx2', '4', '4'),
    ('AuthenticAMD', 'sse2 avx', None, None), ('GenuineIntel', 'fma avx2', None, None)])
def test_mkl_is_told_to_use_avx2_where_it_would_not(monkeypatch, vendor, flags, given, expected):
    processor = f'processor\t: {{}}\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\n'
    monkeypatch.setattr(engine, 'open', lambda path: io.StringIO(processor.format(0) + processor.format(1)), False)
    monkeypatch.setenv('MKL_DEBUG_CPU_TYPE', given or '')
    if given is None:
        monkeypatch.delenv('MKL_DEBUG_CPU_TYPE')
    engine._let_mkl_use_avx2()
    assert os.environ.get('MKL_DEBUG_CPU_TYPE') == expected


# ---------------------------------------------------------------------------------------------------
# First contact

def test_the_tiny_program_agrees_with_numpy_and_finds_wrong_numbers(monkeypatch):
    device.prepare(paddle.CPUPlace(), deterministic=True)

    class Wrong(StaticProgram):
        def __call__(self, **feed):
            return [1.05 * super().__call__(**feed)[0]]
    monkeypatch.setattr(device, 'StaticProgram', Wrong)
    with pytest.raises(UserError, match='computes wrong numbers'):
        device.prepare(paddle.CPUPlace(), deterministic=True)


@pytest.mark.parametrize('deterministic', [False, True])
def test_flags_for_a_gpu(monkeypatch, gpu_build, deterministic):
    flags = {}
    monkeypatch.setattr(paddle, 'set_flags', flags.update)
    monkeypatch.setattr(device, 'check', lambda place: None)
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    device.prepare(FakeGPU(), deterministic)
    expected = {'FLAGS_enable_pir_in_executor_trace_run': True, 'FLAGS_use_default_stream': False}
    if deterministic:
        expected.update(FLAGS_cudnn_deterministic=True, FLAGS_cudnn_exhaustive_search=False)
    assert flags == expected
    assert ('CUBLAS_WORKSPACE_CONFIG' in os.environ) is deterministic
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)

    def refuse(flags):
        raise ValueError
    monkeypatch.setattr(paddle, 'set_flags', refuse)
    expected = pytest.raises(UserError, match='--deterministic: Paddle') if deterministic else contextlib.nullcontext()
    with expected:
        device.prepare(FakeGPU(), deterministic)
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)


STACK = '''

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
0   paddle::framework::StandaloneExecutor::Run(std::vector<std::string> const&, bool)

----------------------
Error Message Summary:
----------------------
'''
MESSAGES = [              # (message of Paddle, cause, remedy)
    ("(External) CUDA error(209), no kernel image is available for execution on the device.\n  [Hint: "
     "'cudaErrorNoKernelImageForDevice'. This indicates that there is no kernel image available that is suitable for "
     "the device.] \n  (at ../paddle/phi/core/platform/device/gpu/gpu_info.cc:133)\n",
     'CUDA error(209), no kernel image is available for execution on the device;', 'no code for this GPU: bash'),
    ("(PreconditionNotMet) The third-party dynamic library (libcudnn.so) that Paddle depends on is not configured "
     "correctly. (error code is /usr/local/cuda/lib64/libcudnn.so: cannot open shared object file: No such file or "
     "directory)\n  Suggestions:\n  1. Check if the third-party dynamic library (e.g. CUDA, CUDNN) is installed "
     "correctly and its version is matched with paddlepaddle you installed.", 'The third-party dynamic library '
     '(libcudnn.so) that Paddle depends on is not configured correctly. (error code is /usr/local/cuda/lib64/'
     'libcudnn.so: cannot open', 'a library of CUDA or cuDNN is missing'),
    ("(PreconditionNotMet) Cannot load cudnn shared library. Cannot invoke method cudnnGetVersion.\n  [Hint: "
     "cudnn_dso_handle should not be null.] (at /paddle/paddle/phi/backends/dynload/cudnn.cc:64)\n",
     'Cannot load cudnn shared library. Cannot invoke method cudnnGetVersion;', 'needs CUDA 11.8 and cuDNN 8.6'),
    (STACK + "ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate 1.125000GB memory on GPU 0, "
     "10.2GB memory has been allocated and available memory is only 512.0MB.\n\nPlease check whether there is any "
     "other process using GPU 0.\n1. If yes, please stop them, or start on another GPU.\n (at /paddle/x.cc:95)\n",
     'Out of memory error on GPU 0. Cannot allocate 1.125000GB memory on GPU 0, 10.2GB memory has been allocated and '
     'available memory is only 512.0MB;', 'reduce --batch_size'),
    (STACK + "ExternalError: CUDA error(46), all CUDA-capable devices are busy or unavailable. \n  [Hint: Please "
     "search for the error code(46) on website] (at /paddle/paddle/phi/backends/gpu/cuda/cuda_info.cc:250)\n",
     'CUDA error(46), all CUDA-capable devices are busy or unavailable;', 'another process uses this GPU exclusively'),
    ("(External) CUDA error(35), CUDA driver version is insufficient for CUDA runtime version. \n  [Hint: "
     "'cudaErrorInsufficientDriver'.] (at /paddle/x.cc:66)",
     'CUDA error(35), CUDA driver version is insufficient for CUDA runtime version;', 'the NVIDIA driver is too old'),
    ("In user code:\n\n    File \"model.py\", line 3, in x\n      return F.conv2d(x)\n\n    ExternalError: CUDNN "
     "error(8), CUDNN_STATUS_EXECUTION_FAILED. \n      [Hint: 'CUDNN_STATUS_EXECUTION_FAILED'.] (at /paddle/x.cu:1)\n"
     "      [operator < conv2d > error]", 'CUDNN error(8), CUDNN_STATUS_EXECUTION_FAILED', ''),
    ("(External) CUBLAS error(3). \n  [Hint: 'CUBLAS_STATUS_ALLOC_FAILED'. Resource allocation failed inside the "
     "cuBLAS library.] (at /paddle/gpu_resources.cc:226)", 'CUBLAS error(3);', 'reduce --batch_size'),
    ("(External) CUDNN error(1), CUDNN_STATUS_NOT_INITIALIZED. \n  [Hint: 'x'.] (at /paddle/x)",
     'CUDNN error(1), CUDNN_STATUS_NOT_INITIALIZED;', 'or driver and CUDA do not match'),
    ("(External) CUDA error(700), an illegal memory access was encountered. \n  [Hint: x] (at /paddle/x.cc:1)",
     'CUDA error(700), an illegal memory access was encountered', ''),
    ("(External) NCCL error(2), unhandled system error. \n  [Hint: 'ncclSystemError'.] (at /paddle/nccl_comm.cc:81)",
     'NCCL error(2), unhandled system error', ''),
]


@pytest.mark.parametrize('message, cause, remedy', MESSAGES)
def test_an_error_of_a_gpu_becomes_one_line_with_cause_and_remedy(gpu_build, message, cause, remedy):
    for kind in (OSError, RuntimeError, MemoryError, SystemError):
        with pytest.raises(UserError) as raised, device.errors(FakeGPU(1)):
            raise kind(message)
        text = str(raised.value)
        assert text.startswith(f'GPU 1: {cause}') and remedy in text and '\n' not in text and len(text) < 450
        assert '/paddle/' not in text and 'Hint' not in text
        assert bool(remedy) == ('; ' in text)


def test_other_errors_are_not_hidden(gpu_build):
    for place, error in ((FakeGPU(), RuntimeError('bad shape in GPUNet')), (paddle.CPUPlace(), OSError(MESSAGES[0][0])),
                         (FakeGPU(), OSError(28, 'No space left on device', '/data/libcudnn.so'))):
        with pytest.raises(type(error)) as raised, device.errors(place):
            raise error
        assert raised.value is error


def test_a_message_that_has_only_advice_is_kept():
    assert device.cause('Please check the driver.') == 'Please check the driver'


def test_an_error_of_nccl_carries_its_reason(monkeypatch, gpu_build):
    monkeypatch.setattr(distributed, '_place', FakeGPU())
    for message, expected in ((MESSAGES[-1][0], 'NCCL failed in process 0, or another process of this run has ended '
                                                '(NCCL error(2), unhandled system error)'),
                              (MESSAGES[-2][0], 'GPU 0 failed in process 0 (CUDA error(700), an illegal memory access'),
                              ('Connection reset', 'another process of this run has ended or cannot be reached (Conn')):
        with pytest.raises(UserError) as raised, distributed._collective():
            raise OSError(message)
        assert str(raised.value).startswith(expected)


def test_a_paddle_that_cannot_be_imported_is_one_line(tmp_path):
    for message, remedy in (("libcudart.so.11.0: cannot open shared object file", 'LD_LIBRARY_PATH'),
                            ("No module named 'setuptools'", 'bash scripts/setup.sh installs it')):
        (tmp_path / 'paddle.py').write_text(f'raise ImportError({message!r})\n')
        done = subprocess.run([sys.executable, 'train.py', '--help'], cwd=ROOT, text=True, capture_output=True,
                              env=dict(os.environ, PYTHONPATH=str(tmp_path)))
        line, = done.stderr.splitlines()
        assert done.returncode == 2 and message in line and remedy in line


# ---------------------------------------------------------------------------------------------------
# Programs

@pytest.fixture(scope='module')
def stores():
    """The stores of searches and of a training, with Paddle's operators, as on a GPU."""
    supernets = [Supernet(2, 5, 3, image_size=8, partial_channels=partial) for partial in (1, 2)]
    for supernet in supernets:
        Architect(supernet)
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, 2, 5, 3, auxiliary=0.4, use_drop_path=True)
    MomentumSGD(network.store, 0.9, 3e-4, 5.0)
    return *(supernet.store for supernet in supernets), network.store


def names(program):
    return [memory._name(operator).rpartition('.')[2].rstrip('_') for operator in program.program.global_block().ops]


@pytest.mark.slow
def test_no_program_adds_atomically_or_rebuilds_an_array_or_fetches(stores):
    """The gradients of these operators add atomically on GPUs; assign_value is an array in a program."""
    forbidden = ('gather', 'scatter', 'index', 'embedding', 'lookup', 'take_along', 'put_along', 'assign_value')
    for store in stores:
        for program in store.programs:
            assert not [name for name in names(program) if name.startswith(forbidden)]
        assert sum(bool(program.fetches) for program in store.programs) <= 1         # the mixing weights, for the log


@pytest.mark.slow
def test_a_step_feeds_images_and_labels_once_and_copies_two_numbers(monkeypatch):
    """Of a step of the search: two batches, and the bias correction of Adam."""
    supernet = Supernet(2, 5, 3, image_size=8)
    architect = Architect(supernet)
    optimizer = architect.optimizer
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(2, 3, 8, 8)), rng.integers(0, 5, (2, 1))
    calls, transfers = [], []
    original = StaticProgram.__call__, VariableStore.set, VariableStore.tensor, VariableStore.get

    def call(program, **feed):
        calls.append(program)
        transfers.extend(name for name, value in feed.items() if isinstance(value, np.ndarray))
        return original[0](program, **feed)

    monkeypatch.setattr(StaticProgram, '__call__', call)
    for name, method in zip(('set', 'tensor', 'get'), original[1:]):
        def counted(store, *args, name=name, method=method):
            transfers.append(f'{name} {args[0]}' if name != 'tensor' else name)
            return method(store, *args)
        monkeypatch.setattr(VariableStore, name, counted)

    def step(lr):
        calls.clear()
        transfers.clear()
        train, valid = supernet.feed(*batch), supernet.feed(*batch)
        architect.update(train, valid, lr)
        supernet.run(train)
        optimizer.step(lr)
    for lr, changed in ((0.1, ['set lr']), (0.1, []), (0.2, ['set lr'])):
        step(lr)
        assert sorted(transfers) == sorted(['tensor'] * 4 + changed + ['bias_correction', 'get metrics'])
    assert len(calls) == 11 and calls.count(supernet._run) == 5


@pytest.mark.skipif(paddle.__version__.startswith('2.'), reason="Paddle 2 finds prepared programs quickly")
@pytest.mark.slow
def test_a_prepared_program_is_run_without_looking_it_up(monkeypatch):
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 5, 4)
    supernet = Supernet(2, 5, 3, 'float64', image_size=8)
    runs = []
    original = paddle.static.Executor.run
    monkeypatch.setattr(paddle.static.Executor, 'run', lambda self, *args, **settings: (
        runs.append(self), original(self, *args, **settings))[1])
    first, second, weights = supernet.gradients(*batch), supernet.gradients(*batch), supernet.mixing_weights()
    assert len(runs) == 2 and supernet._run._prepared
    supernet._run._prepared = None                   # a Paddle whose function has other parameters, or none
    for function in (lambda self, program: None, None):
        monkeypatch.setattr(paddle.static.Executor, '_pir_feed_data', function)
        assert supernet._run._prepare(supernet.feed(*batch)) is None
    monkeypatch.undo()
    third = supernet.gradients(*batch)
    for name, gradient in first.weights.items():
        assert gradient.tobytes() == second.weights[name].tobytes() == third.weights[name].tobytes()
    assert all(np.array_equal(weights[name], table) for name, table in supernet.mixing_weights().items())


# ---------------------------------------------------------------------------------------------------
# Memory

def test_the_peak_is_that_of_the_tensors_that_live_at_the_same_time():
    """a, b = 10, 20; c (5) reads a, which is freed; d (40) reads c and b; e is never read."""
    operations = [Operation([], {'a': 10}), Operation([], {'b': 20}), Operation(['a'], {'c': 5}),
                  Operation(['c', 'b'], {'d': 40}), Operation(['d'], {'e': 1})]
    assert memory.peak(operations) == 5 + 20 + 40
    assert memory.peak(operations[:3]) == 30                             # b is freed at once, as nothing reads it
    assert memory.peak([]) == 0


@pytest.mark.parametrize('activation, kept', [(paddle.nn.functional.relu, 192), (lambda x: x, 0)], ids=['relu', 'none'])
def test_the_estimate_follows_a_program(activation, kept):
    """The gradient of a ReLU needs its result, that of a concatenation only the shapes of its inputs."""
    store = VariableStore(paddle.CPUPlace())
    store.set('w', np.ones([1, 3, 4, 4]))

    def build():
        w = store.variable('w', trainable=True)
        x = activation(store.input('x', [None, 3, 4, 4]) * w)                        # 192 bytes per image
        loss = paddle.sum(paddle.concat([x, x], axis=1))                             # 384 bytes
        store.assign('w', paddle.static.gradients([loss], [w])[0])
        return []
    StaticProgram(store, build)
    small, large = memory.estimate(store, 1), memory.estimate(store, 101)
    # The gradient of the concatenation and those of both its parts exist at the same time.
    assert (large - small) / 100 == kept + 384 + 2 * 192
    assert 192 <= small - (large - small) / 100 < 1000                               # w and constants


def test_the_estimate_of_a_step_grows_with_the_batch_and_is_logged(stores, caplog):
    small, large = (memory.estimate(stores[0], size) for size in (8, 64))
    assert 6 < large / small < 8
    with caplog.at_level(logging.INFO, 'darts'):
        device.announce_memory(stores[0], 64)
    assert caplog.messages == [f'memory of the tensors at 64 images per process: {large / 1e9:.1f} GB (estimate)']


def test_a_gpu_that_is_too_small_is_said_before_the_first_step(monkeypatch, caplog, gpu_build):
    store = SimpleNamespace(place=FakeGPU(), names=[], programs=[])
    monkeypatch.setattr(memory, 'estimate', lambda store, batch_size: 9e9)
    for total, text in ((11e9, 'the GPU has 11.0 GB'), (8e9, 'the GPU has 8.0 GB: reduce --batch_size')):
        monkeypatch.setattr(paddle.device.cuda, 'get_device_properties',
                            lambda number, total=total: SimpleNamespace(total_memory=total))
        with caplog.at_level(logging.INFO, 'darts'):
            device.announce_memory(store, 64)
        assert caplog.messages[-1].endswith(f'9.0 GB (estimate), and 1 to 2 GB for CUDA; {text}')


def test_there_is_no_estimate_for_compiled_operators(compiled, caplog):
    if not compiled:
        pytest.skip('the operators of this project could not be compiled')
    from engine import custom_ops
    custom_ops.enable()
    try:
        store = Supernet(2, 5, 3, image_size=8).store
    finally:
        custom_ops.enable(False)
    assert memory.estimate(store, 8) is None
    with caplog.at_level(logging.INFO, 'darts'):
        device.announce_memory(store, 8)
    assert not caplog.messages
