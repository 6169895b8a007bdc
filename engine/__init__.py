"""The machinery below the search and the trainings: programs, parameters, checkpoints, the epoch loop.

It knows no genotype, data set or network: it imports `utils` and itself, nothing else of the project.

Importing this file has side effects on the process, as no other file of the project has, but for the error hook of
utils.py. They have to come before the first `import paddle`, so a module that uses Paddle imports something of `engine`
first:

* Paddle's C++ library reports its start-up at log level INFO and WARNING: silenced unless GLOG_minloglevel is set.
* Paddle's Python code raises deprecation warnings against itself, Pillow warns of damaged metadata and of large images:
  hidden. imagenet_reader reports the images that cannot be read.
* Paddle sets OMP_NUM_THREADS to 1 where the user has not set it: the user's value is kept in `OMP_NUM_THREADS`.
* glibc returns freed memory to the system after each step and faults it in again: see `_keep_freed_memory`.
* Paddle 2.6 exports zlib's symbols: Python's zlib crashes if it is loaded after Paddle, so it is loaded before.
* Paddle frees each tensor of the CPU in a task for another thread, which takes as long as a small operator: 1 MB is
  collected first.
* Threads of OpenMP that wait for others would keep their cores busy, also when another process needs them. Unless
  OMP_WAIT_POLICY is set, they sleep after some tens of microseconds: most waits are shorter, and without that time a
  step takes up to 15 % longer.
* MKL, with which Paddle multiplies matrices on the CPU, uses SSE on processors that are not Intel's: it is told to use
  AVX2 where they have it (unless MKL_DEBUG_CPU_TYPE is set). Measured on an AMD EPYC: a product of two matrices of
  1024 x 1024 takes 0.34 to 0.40 of the time.
* TF32 of NVIDIA's libraries is off unless NVIDIA_TF32_OVERRIDE is set: its rounding changes the finite
  difference of the second order by 16 to 21 % (simulated against float64).
* Importing Paddle creates 195,000 objects that stay: Python's garbage collector is off meanwhile, and skips them later.
* Programs are built in static mode: paddle.enable_static().
"""
import ctypes
import gc
import itertools
import os
import sys
import warnings
import zlib  # noqa: F401  see above

import utils

OMP_NUM_THREADS: str = os.environ.get('OMP_NUM_THREADS', '')


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step.

    Paddle allocates every CPU tensor with malloc. All threads share one arena: tensors move between threads, and each
    arena would grow to the largest step that it has seen.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        for option, value in ((-3, 1 << 30), (-1, 2 ** 31 - 1), (-8, 1)):      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD,
            libc.mallopt(option, value)                                       # M_ARENA_MAX
    except (OSError, AttributeError):
        pass                       # another C library: slower, not wrong


def _let_mkl_use_avx2() -> None:
    try:
        with open('/proc/cpuinfo') as file:                              # the lines of the first processor
            words = ' '.join(itertools.takewhile(str.strip, file)).split()
    except OSError:
        return                     # another system: slower, not wrong
    if 'GenuineIntel' not in words and {'avx2', 'fma'} <= set(words):
        os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')


def _exit_without_paddle(error: Exception) -> None:
    """Ends the process with one line: Paddle is missing, or it lacks a library of CUDA or a Python package."""
    reason = ' '.join(str(error).split())[:200]
    if '.so' in reason:            # Paddle 2.6 for GPUs links with libraries of the system
        remedy = ("a library of the system is missing: bash scripts/setup.sh installs a Paddle that brings its own; "
                  "Paddle 2.6 for GPUs needs CUDA 11.8 and cuDNN 8.6 in LD_LIBRARY_PATH")
    else:
        remedy = utils.INSTALLATION
    print(f"error: Paddle cannot be imported ({reason}): {remedy}", file=sys.stderr)
    sys.exit(2)


os.environ.setdefault('GLOG_minloglevel', '2')
os.environ.setdefault('FLAGS_eager_delete_tensor_gb', '0.001')
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ['OMP_WAIT_POLICY'] = 'passive'
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')
warnings.filterwarnings('ignore', module=r'(paddle|PIL)\b.*')
_keep_freed_memory()
_let_mkl_use_avx2()

gc.disable()
try:
    import paddle
except Exception as error:         # also of another type, when its files are damaged
    _exit_without_paddle(error)
gc.freeze()
gc.enable()

paddle.enable_static()
