"""What the processes of one run say to each other; `python -m paddle.distributed.launch` starts them.

Each computes its part of every batch; gradients are averaged, so that all of them take the same step. With one process
nothing here does anything.
"""
import contextlib
import io
import itertools
import os
import time

import numpy as np

from utils import UserError

launched = 'PADDLE_RANK_IN_NODE' in os.environ         # by paddle.distributed.launch
rank = int(os.environ.get('PADDLE_TRAINER_ID', 0))
processes = int(os.environ.get('PADDLE_TRAINERS_NUM', 1))
main = rank == 0                                       # whether this process logs and saves
_first_here = os.environ.get('PADDLE_RANK_IN_NODE', '0') == '0'
seconds = 0.0                                          # spent in here so far, with waiting for slower processes
_places = itertools.count()                            # where `wait` was called
_parent = os.getppid()


def connect(place):
    """Joins the other processes; place: where this one computes. To be called after the fork of any worker."""
    if processes == 1:
        return
    import paddle
    if isinstance(place, paddle.CPUPlace):
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'   # launch chooses by what the machine has
    paddle.disable_static()
    with contextlib.redirect_stderr(io.StringIO()), _exchange():     # it says its flags
        paddle.distributed.init_parallel_env()
    paddle.enable_static()


def orphaned():
    """Whether launch has ended, killed or without passing on the signal that ended it."""
    return launched and os.getppid() != _parent


def average(store, *names):
    """Averages vectors of a parameters.Store over the processes, in place and on the device."""
    if processes == 1:
        return
    import paddle
    with paddle.base.dygraph.guard(), _exchange():
        for name in names:
            tensor = paddle.Tensor(store.scope.find_var(name).get_tensor())      # shares the vector's memory
            paddle.distributed.all_reduce(tensor)
            tensor.scale_(1 / processes)


def total(values):
    """The sums of a list of numbers over the processes."""
    if processes == 1:
        return values
    import paddle
    with paddle.base.dygraph.guard(), _exchange():
        tensor = paddle.to_tensor(np.array(values, 'float64'))
        paddle.distributed.all_reduce(tensor)
        return tensor.numpy().tolist()


def mean(values):
    """The means of a list of numbers over the processes."""
    return [value / processes for value in total(values)]


def wait():
    """Until all processes have come here, for a quarter of an hour at most: gloo's sums wait for 30 seconds only."""
    if processes == 1:
        return
    import paddle
    store, place = paddle.base.core.create_or_get_global_tcp_store(), f'darts {next(_places)}'
    with _exchange():
        if store.add(place, 1) == processes:
            store.set(f'{place}: all', b'here')
        store.wait(f'{place}: all')
    total([0])           # the process that holds the store may end after this, and not before the others were told


def of_main(arrays):
    """{name: array} of the main process; every process gives arrays of the same names, shapes and types."""
    if processes == 1:
        return arrays
    import paddle
    with paddle.base.dygraph.guard(), _exchange():
        tensors = {name: paddle.to_tensor(np.atleast_1d(array)) for name, array in sorted(arrays.items())}
        for tensor in tensors.values():
            paddle.distributed.broadcast(tensor, src=0)
        return {name: tensor.numpy().reshape(np.shape(arrays[name])) for name, tensor in tensors.items()}


def one_then_all(function):
    """function(), by one process of each machine first: what it downloads or compiles, the others find."""
    if _first_here:
        result = function()
    wait()
    return result if _first_here else function()


@contextlib.contextmanager
def _exchange():
    """Adds to `seconds`; says in a line that the connection to another process broke: that one knows why."""
    global seconds
    began = time.time()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"another process of this run has ended or cannot be reached ({str(error).strip()[-100:]}); "
                        "the logs of all processes are in launch's --log_dir") from None
    finally:
        seconds += time.time() - began
