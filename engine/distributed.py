"""Collective operations between the ranks of a run, which `python -m paddle.distributed.launch` starts.

Each rank computes a shard of every batch; gradients are averaged, so that all ranks take the same step. With a world
size of 1 every operation returns its argument at once.
"""
from __future__ import annotations

import contextlib
import io
import itertools
import os
import time
from typing import Any, Callable

import numpy as np

from engine import device
from utils import UserError

launched = 'PADDLE_RANK_IN_NODE' in os.environ         # by paddle.distributed.launch
rank = int(os.environ.get('PADDLE_TRAINER_ID', 0))
world_size = int(os.environ.get('PADDLE_TRAINERS_NUM', 1))
is_main = rank == 0                                    # rank 0 logs and saves
seconds = 0.0                                          # spent in collectives so far, including waiting for other ranks
_is_local_rank0 = os.environ.get('PADDLE_RANK_IN_NODE', '0') == '0'
_barriers = itertools.count()
_parent = os.getppid()
_place: Any = None                                     # the device of this rank, since `connect`


def connect(place) -> None:
    """Joins the other ranks; place: the device of this rank. Has to be called after any worker process is forked."""
    global _place
    if world_size == 1:
        return
    import paddle
    _place = place
    if not device.is_gpu(place):
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'   # launch chooses by the hardware of the machine
    paddle.disable_static()
    with contextlib.redirect_stderr(io.StringIO()), _collective():     # Paddle prints its flags
        paddle.distributed.init_parallel_env()
    paddle.enable_static()


def orphaned() -> bool:
    """Whether launch has ended without passing on the signal that ended it."""
    return launched and os.getppid() != _parent


def average_gradients(store, *names: str) -> None:
    """Averages vectors of a programs.VariableStore over the ranks, in place and on the device."""
    if world_size == 1:
        return
    import paddle
    with _eager(), _collective():
        for name in names:
            tensor = paddle.Tensor(store.scope.find_var(name).get_tensor())      # shares the vector's memory
            paddle.distributed.all_reduce(tensor)
            tensor.scale_(1 / world_size)


def all_reduce_sum(values: list[float]) -> list[float]:
    """Returns the sums of a list of numbers over the ranks."""
    if world_size == 1:
        return values
    import paddle
    with _eager(), _collective():
        tensor = paddle.to_tensor(np.array(values, 'float64'))
        paddle.distributed.all_reduce(tensor)
        return tensor.numpy().tolist()


def all_reduce_mean(values: list[float]) -> list[float]:
    """Returns the means of a list of numbers over the ranks."""
    return [value / world_size for value in all_reduce_sum(values)]


def barrier() -> None:
    """Blocks until all ranks have called it, at most 15 minutes; a collective of gloo waits 30 seconds only."""
    if world_size == 1:
        return
    import paddle
    store, key = paddle.base.core.create_or_get_global_tcp_store(), f'darts {next(_barriers)}'
    with _collective():
        if store.add(key, 1) == world_size:
            store.set(f'{key}: all', b'here')
        store.wait(f'{key}: all')
    all_reduce_sum([0])  # the rank that hosts the store may exit next: not before all ranks have read the key


def broadcast(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns rank 0's {name: array}; all ranks pass arrays of the same names, shapes and types."""
    if world_size == 1:
        return arrays
    import paddle
    with _eager(), _collective():
        tensors = {name: paddle.to_tensor(np.atleast_1d(array)) for name, array in sorted(arrays.items())}
        for tensor in tensors.values():
            paddle.distributed.broadcast(tensor, src=0)
        return {name: tensor.numpy().reshape(np.shape(arrays[name])) for name, tensor in tensors.items()}


def local_rank0_first(function: Callable[[], Any]) -> Any:
    """Returns function(), called on one rank of each machine before the others, which find its downloads and files."""
    if _is_local_rank0:
        result = function()
    barrier()
    return result if _is_local_rank0 else function()


def _eager():
    """Executes statements at once and on the device of this rank, which is not Paddle's default on a machine with GPUs.

    paddle.enable_static() has undone the device that init_parallel_env set. Elsewhere tensors would be copies of the
    vectors, and averages would be lost.
    """
    import paddle
    return paddle.base.dygraph.guard(_place)


@contextlib.contextmanager
def _collective():
    """Adds to `seconds`, and raises UserError when a collective fails."""
    global seconds
    began = time.time()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error)
        if not device.from_gpu(_place, text):
            what = "another process of this run has ended or cannot be reached"
        elif 'NCCL' in text.upper():
            what = f"NCCL failed in process {rank}, or another process of this run has ended"
        else:                                          # a kernel that was started before the collective
            what = f"GPU {_place.get_device_id()} failed in process {rank}"
        raise UserError(f"{what} ({device.explain(text)}); the logs of all processes are in launch's "
                        "--log_dir") from None
    finally:
        seconds += time.time() - began
