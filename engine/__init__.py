"""The machinery below the search and the trainings: programs, parameters, checkpoints, the epoch loop.

It knows no genotype, data set or network: it imports `utils` and itself, nothing else of the project.

This file is the only place of the project where importing has side effects on the process. They have to come before the
first `import paddle`, so a module that uses Paddle imports something of `engine` first:

* Paddle's C++ library reports its start-up at log level INFO and WARNING: silenced unless GLOG_minloglevel is set.
* Paddle's Python code raises deprecation warnings against itself, Pillow warns of damaged metadata and of large images:
  hidden. imagenet_reader reports the images that cannot be read.
* Paddle sets OMP_NUM_THREADS to 1 where the user has not set it: the user's value is kept in `OMP_NUM_THREADS`.
* glibc returns freed memory to the system after each step and faults it in again: see `_keep_freed_memory`.
* Paddle 2.6 exports zlib's symbols: Python's zlib crashes if it is loaded after Paddle, so it is loaded before.
* TF32 of NVIDIA's libraries is off unless NVIDIA_TF32_OVERRIDE is set: its rounding changes the finite
  difference of the second order by 16 to 21 % (simulated against float64).
* Programs are built in static mode: paddle.enable_static().
"""
import ctypes
import os
import warnings
import zlib  # noqa: F401  see above

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


os.environ.setdefault('GLOG_minloglevel', '2')
os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')
warnings.filterwarnings('ignore', module=r'(paddle|PIL)\b.*')
_keep_freed_memory()

import paddle  # noqa: E402

paddle.enable_static()
