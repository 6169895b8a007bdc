"""The device of a run: choice, first contact, flags, memory, and Paddle's errors on a GPU with their remedies.

Nothing here has been run on a GPU yet. The tests replace what a CPU build of Paddle lacks, and use messages of Paddle
that users have reported.
"""
from __future__ import annotations

import contextlib
import logging
import os
import re

import engine  # noqa: F401  before paddle
import numpy as np
import paddle

import utils
from engine import memory
from engine.programs import StaticProgram, VariableStore
from utils import UserError

log = logging.getLogger('darts')

DRIVER = '/proc/driver/nvidia/version'           # exists while the driver of NVIDIA is loaded
SETUP = "bash scripts/setup.sh installs the build for this machine"
REMEDIES = {                       # {pattern of a message: what to do}, the first that is found
    'no kernel image|CUDA error\\(209\\)|Mismatched GPU Arch':
        f"this build of Paddle has no code for this GPU: {SETUP}",
    'driver version is insufficient|InsufficientDriver|CUDA error\\((35|803|804)\\)':
        "the NVIDIA driver is too old for this build of Paddle: update it, or CUDA=11.8 bash scripts/setup.sh",
    'libnccl|nccl shared library|NCCL.*not (found|loaded)':
        f"the library NCCL is missing: {SETUP}; Paddle 2.6 needs the NCCL of the system (apt install libnccl2)",
    '(lib)?(cudnn|cublas|cublasLt|cudart|cusolver|cusparse|curand|cufft|nvrtc|nvJitLink)[\\w.]*(\\.so| shared library)':
        f"a library of CUDA or cuDNN is missing: {SETUP}; Paddle 2.6 needs CUDA 11.8 and cuDNN 8.6 of the system, in "
        "LD_LIBRARY_PATH",
    'busy or unavailable|DevicesUnavailable|CUDA error\\(46\\)':
        "another process uses this GPU exclusively: wait, or choose another one with CUDA_VISIBLE_DEVICES (nvidia-smi "
        "lists them)",
    'CU(DNN|BLAS)_STATUS_NOT_INITIALIZED':
        f"another process has taken the memory of the GPU (see nvidia-smi), or driver and CUDA do not match: {SETUP}",
    '[Oo]ut of memory|MemoryAllocation|CUDA error\\(2\\)|CU(DNN|BLAS)_STATUS_ALLOC_FAILED':
        "the memory of the GPU is not sufficient: reduce --batch_size, or choose another GPU with CUDA_VISIBLE_DEVICES "
        "(nvidia-smi shows which processes use it)",
    'no CUDA-capable device|invalid device ordinal|CUDA error\\((100|101)\\)':
        "this GPU is not visible: see CUDA_VISIBLE_DEVICES and nvidia-smi",
}
FROM_GPU = '(CUDA|CUDNN|CUBLAS|NCCL) error|' + '|'.join(REMEDIES)


def find_place(use_gpu: bool | None):
    """Returns the place to compute on; use_gpu: True, False, or None for a GPU if the installed Paddle finds one.

    Of several GPUs it is the one that paddle.distributed.launch assigns to this process, otherwise the first. Raises
    UserError when a GPU is requested and Paddle finds none.
    """
    if use_gpu is not False and gpu_count():
        return paddle.CUDAPlace(int(os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]))
    if use_gpu:
        raise UserError(f"--use_gpu True: {why_no_gpu()}; without the flag the CPU is used")
    return paddle.CPUPlace()


def gpu_count() -> int:
    """Returns the number of GPUs that the installed Paddle finds."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def why_no_gpu() -> str:
    """Returns why the installed Paddle finds no GPU."""
    if not paddle.is_compiled_with_cuda():
        return f"this is a build of Paddle {paddle.__version__} for the CPU" + (
            f", but the machine has the driver of NVIDIA: {SETUP}" if os.path.exists(DRIVER) else '')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return f"Paddle {paddle.__version__} finds no GPU, " + (
        f"because CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else
        "although the driver of NVIDIA is loaded: see nvidia-smi" if os.path.exists(DRIVER) else
        "because the driver of NVIDIA is not loaded")


def prepare(place, deterministic: bool) -> None:
    """Sets Paddle's flags for the device and runs a tiny program on it; raises UserError when it cannot be used."""
    with errors(place):
        if is_gpu(place):
            _set_gpu_flags(deterministic)
        check(place)


def announce(place, use_gpu: bool | None, world_size: int = 1) -> None:
    """Logs the device, the versions, and their number if there are several processes.

    When a build of Paddle for GPUs, or a machine with one, computes on the CPU, it says why.
    """
    if is_gpu(place):
        device = _describe_gpu(place.get_device_id())
    else:
        device = f"CPU ({utils.cores()} cores)"
        if gpu_count():
            device += ", because of --use_gpu False"
        elif paddle.is_compiled_with_cuda() or os.path.exists(DRIVER):
            device += f", because {why_no_gpu()}"
    processes = f", {world_size} processes" if world_size > 1 else ''
    log.info(f"device: {device}, Paddle {paddle.__version__}{processes}")


def announce_memory(store, batch_size: int) -> None:
    """Logs the estimate of the memory that a step takes; batch_size: images per process.

    What a compiled operator keeps for its gradient is not known before its first run, so there is no estimate then.
    """
    needed = memory.estimate(store, batch_size)
    if needed is None:
        return
    text = f"memory of the tensors at {batch_size} images per process: {needed / 1e9:.1f} GB (estimate)"
    if is_gpu(store.place):
        total = paddle.device.cuda.get_device_properties(store.place.get_device_id()).total_memory
        text += f", and 1 to 2 GB for CUDA; the GPU has {total / 1e9:.1f} GB"
        if needed > total:
            text += ": reduce --batch_size"
    log.info(text)


def peak_memory(place) -> str:
    """Returns the largest memory of the process so far, and that on its GPU, as text for the log."""
    text = f"peak memory {utils.peak_memory():.2f} GB"
    if is_gpu(place):
        text += f", on the GPU {paddle.device.cuda.max_memory_reserved(place) / 1e9:.2f} GB"
    return text


def is_gpu(place) -> bool:
    """Whether a place is that of a GPU."""
    return isinstance(place, paddle.CUDAPlace)


def _describe_gpu(number: int) -> str:
    properties = paddle.device.cuda.get_device_properties(number)
    cudnn = paddle.get_cudnn_version() or 0        # 8600 is 8.6.0, 90501 is 9.5.1
    major = 10_000 if cudnn >= 90_000 else 1000
    version = f"{cudnn // major}.{cudnn % major // 100}.{cudnn % 100}" if cudnn else "is missing"
    tf32 = os.environ.get('NVIDIA_TF32_OVERRIDE')
    return (f"GPU {number} ({properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 1e9:.1f} GB), CUDA {paddle.version.cuda()}, cuDNN {version}, "
            f"TF32 {'off' if tf32 == '0' else f'not off (NVIDIA_TF32_OVERRIDE={tf32})'}")


def _set_gpu_flags(deterministic: bool) -> None:
    """Sets Paddle's flags for a GPU; `deterministic`: those that make two runs equal, at the cost of speed.

    cuDNN has convolutions and poolings whose gradients add atomically, in another order in every run; cuBLAS may choose
    its algorithm by the workspace that is free.
    """
    # Kernels are asynchronous: threads would only cost time. Copies have to wait for kernels, as they do by default.
    for name, value in (('FLAGS_enable_pir_in_executor_trace_run', True), ('FLAGS_use_default_stream', False)):
        with contextlib.suppress(ValueError):                    # Paddle 2.6 has neither
            paddle.set_flags({name: value})
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        try:
            paddle.set_flags({'FLAGS_cudnn_deterministic': True, 'FLAGS_cudnn_exhaustive_search': False})
        except ValueError:
            raise UserError(f"--deterministic: Paddle {paddle.__version__} lacks the flags of cuDNN for it") from None


def check(place) -> None:
    """Runs a convolution and a normalisation on the device and compares the result with numpy.

    A build of Paddle without code for the device may compute nothing without an error. Raises UserError then.
    """
    store = VariableStore(place)
    images = np.random.default_rng(0).normal(size=[1, 2, 4, 4]).astype('float32')
    kernel = np.array([[1, 2], [-1, 1]], 'float32').reshape(2, 2, 1, 1)
    store.set('kernel', kernel)
    for name, value in (('mean', 0), ('variance', 1), ('scale', 1), ('shift', 0)):
        store.set(name, np.full(2, value))

    def build() -> list:
        x = paddle.nn.functional.conv2d(store.input('images', [None, 2, 4, 4]), store.variable('kernel'))
        return [paddle.nn.functional.batch_norm(x, *map(store.variable, ('mean', 'variance', 'scale', 'shift')),
                                                training=True)]

    found, = StaticProgram(store, build)(images=images)
    x = np.einsum('oi,nihw->nohw', kernel[:, :, 0, 0], images)
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    if not np.abs(found - expected).max() < 0.02:                # TF32 has 10 bits
        raise UserError(f"{place} computes wrong numbers: the driver or this build of Paddle does not fit it; {SETUP}")


@contextlib.contextmanager
def errors(place):
    """Raises UserError for an error of a GPU inside the `with` block: what happened, and what to do."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError, SystemError) as error:
        # Errors of files have a number. The programs fetch nothing, so an error may appear at a later statement.
        if getattr(error, 'errno', None) or not from_gpu(place, str(error)):
            raise
        raise UserError(f"GPU {place.get_device_id()}: {explain(str(error))}") from None


def from_gpu(place, text: str) -> bool:
    """Whether an error message comes from the GPU of a place, or from a library of CUDA."""
    return is_gpu(place) and bool(re.search(FROM_GPU, text))


def explain(text: str) -> str:
    """Returns the cause in an error message of Paddle, and what to do if that is known."""
    remedy = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text)), None)
    return f"{cause(text)}; {remedy}" if remedy else cause(text)


def cause(text: str) -> str:
    """Returns the sentence in an error message of Paddle that says what happened.

    The message may begin with the stacks of C++ and of Python, and it may end with hints and the place in the source.
    """
    start = list(re.finditer(r'^\s*(\w+Error: |\([A-Z]\w+\) )', text, re.MULTILINE))
    text = text[start[-1].end():] if start else text[-200:]
    summary = re.split(r'\[Hint|Suggestions:|\(at /|\[operator|Please', text)[0].strip() or text
    return ' '.join(summary.split()).rstrip('.')[:200]
