"""Named vectors on a device, and the static programs that read and write them.

A `VariableStore` keeps the vectors; a `StaticProgram` is compiled once over a store and run as often as needed. Vectors
stay on the device between runs. The store also declares which of them are the state of a run: vectors created with
saved=True, and the numbers in `host_state`, survive a resume.
"""
from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Callable

import numpy as np
import paddle

from utils import in_pir_mode


class VariableStore:
    """Named vectors on one device, shared by the static programs that are compiled for it.

    place: a paddle.CPUPlace() or paddle.CUDAPlace(i); dtype: 'float32' or 'float64' of all vectors.
    host_state: {name: number} of the run's state that is kept in Python.
    """

    def __init__(self, place, dtype: str = 'float32'):
        self.place, self.dtype = place, dtype
        self.scope = paddle.base.core.Scope()
        self.programs: list[StaticProgram] = []
        self.host_state: dict[str, float] = {}
        self.names: list[str] = []
        self._saved: list[str] = []
        self._numbers: dict[str, float] = {}       # as `set_number` wrote them

    def set(self, name: str, array, saved: bool = False) -> None:
        """Writes a numpy array to the vector `name`, and creates the vector, with the shape of the array, at the first
        call. saved: whether the vector belongs to `state`, and so to every checkpoint.
        """
        array = np.ascontiguousarray(array, self.dtype)
        if name in self.names:
            array = array.reshape(self.scope.find_var(name).get_tensor().shape())
        else:
            self.names.append(name)
        if saved and name not in self._saved:
            self._saved.append(name)
        self.scope.var(name).get_tensor().set(array, self.place)
        self._numbers.pop(name, None)

    def set_number(self, name: str, value: float) -> None:
        """Writes a number to the vector `name` of length 1; copies it to the device only when it has changed."""
        if self._numbers.get(name) != value:
            self.set(name, [value])
            self._numbers[name] = value

    def get(self, name: str) -> np.ndarray:
        """Returns a copy of the vector `name`."""
        return np.array(self.scope.find_var(name).get_tensor())

    def state(self) -> dict[str, np.ndarray]:
        """Returns copies of all saved vectors and of `host_state`, {name: array}."""
        return {**{name: self.get(name) for name in self._saved},
                **{name: np.array(value) for name, value in self.host_state.items()}}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Sets what `state` has returned."""
        for name in self._saved:
            self.set(name, state[name])
        for name, value in self.host_state.items():
            self.host_state[name] = type(value)(state[name])

    def variable(self, name: str, trainable: bool = False):
        """Returns the existing vector `name` as a variable of the program under construction."""
        shape = self.scope.find_var(name).get_tensor().shape()
        variable = paddle.static.create_parameter(
            shape, self.dtype, name=name, default_initializer=paddle.nn.initializer.Constant(0.0))
        variable.stop_gradient = not trainable
        return variable

    def assign(self, name: str, value) -> None:
        """Adds to the program under construction: write `value` to the vector `name`, on the device."""
        paddle.assign(value, output=self.variable(name))

    def input(self, name: str, shape, dtype: str | None = None):
        """Returns an input of the program under construction; None in `shape` is the size of the batch."""
        dtype = dtype or self.dtype
        self.programs[-1].inputs[name] = (shape, dtype)
        return paddle.static.data(name, shape, dtype)

    def scalar(self, value: float):
        """Returns a constant [1] of the program under construction, in the store's precision.

        A Python number in a product with a variable would be rounded to float32 by Paddle.
        """
        return constant([1], value, self.dtype)

    def tensor(self, array):
        """Returns a tensor on the device, to be fed more than once without a second transfer."""
        core = paddle.base.core
        tensor = core.DenseTensor() if hasattr(core, 'DenseTensor') else core.LoDTensor()
        tensor.set(np.ascontiguousarray(array), self.place)
        return tensor

    @property
    def operators(self) -> int:
        """The number of operators of all programs over this store."""
        return sum(program.operators for program in self.programs)

    def warm_up(self) -> None:
        """Runs every program once on a dummy image, so that the executors prepare them; changes no vector."""
        vectors = {name: self.get(name) for name in self.names}
        rng = np.random.default_rng(0)
        for program in self.programs:
            program(**{name: rng.uniform(0.5, 1.5, [1 if size is None else size for size in shape]).astype(dtype)
                       for name, (shape, dtype) in program.inputs.items()})
        for name, array in vectors.items():
            self.set(name, array)


class StaticProgram:
    """A static program over the vectors of a store, compiled once.

    build: is called with the program as the default program and returns the list of variables to fetch. A call takes
    the inputs by name (numpy arrays or `VariableStore.tensor`) and returns the fetched values as numpy arrays.
    """

    def __init__(self, store: VariableStore, build: Callable[[], list]):
        self.store, self.inputs = store, {}
        store.programs.append(self)
        self.program = paddle.static.Program()
        _constants.clear()
        with paddle.static.program_guard(self.program, paddle.static.Program()), _short_stacks():
            self.fetches = build()
        _constants.clear()
        _simplify(self.program)
        # One executor per program: an executor caches eight prepared programs and prepares others at each call.
        self._executor = paddle.static.Executor(store.place)
        self._prepared: tuple | None = None
        self.operators = len(self.program.global_block().ops)

    def __call__(self, **feed) -> list[np.ndarray]:
        if self._prepared:
            program, executor, inputs = self._prepared
            self._executor._pir_feed_data(program, feed, self.store.scope, inputs)
            return executor.run(list(feed))
        results = self._executor.run(self.program, feed=feed, fetch_list=self.fetches, scope=self.store.scope)
        self._prepared = self._prepare(feed)
        return results

    def _prepare(self, feed: dict) -> tuple | None:
        """Returns what Paddle 3's executor has prepared in its first run, (program, executor, inputs), or None.

        Executor.run looks it up by the text of the program. To write the text of a supernet's program takes longer than
        to start all its operators. The functions used here are not public: without them `Executor.run` is called.
        """
        if not in_pir_mode():
            return None
        executor, cache = self._executor, getattr(self._executor, '_executor_cache', None)
        try:
            prepared = cache.get_pir_program_and_executor(self.program, feed, self.fetches, 'feed', 'fetch',
                                                          executor.place, self.store.scope, executor.plan)
            inspect.signature(executor._pir_feed_data).bind(prepared[0], feed, self.store.scope, prepared[2])
            inspect.signature(prepared[1].run).bind([])
            return prepared
        except (AttributeError, TypeError, IndexError):
            return None


@contextlib.contextmanager
def _short_stacks():
    """Limits the calls that Paddle records with each operator to the innermost ones, which reach into this project.

    With Paddle's operators the complete stacks take a quarter of the time of construction.
    """
    with_limit, before = hasattr(sys, 'tracebacklimit'), getattr(sys, 'tracebacklimit', None)
    sys.tracebacklimit = 8
    try:
        yield
    finally:
        if with_limit:
            sys.tracebacklimit = before
        else:
            del sys.tracebacklimit


_constants: dict = {}


def constant(shape, value: float, dtype, trainable: bool = False):
    """Returns a constant of the program under construction; equal calls share one operator."""
    key = (tuple(shape), value, str(dtype), trainable)
    if key not in _constants:
        _constants[key] = paddle.full(shape, value, dtype)
        _constants[key].stop_gradient = not trainable
    return _constants[key]


def _simplify(program) -> None:
    """Removes operators without an effect from a program of Paddle 3; Paddle 2.6 creates none.

    Paddle 3 has an operator for every shape, axis and kernel size, and the gradient of a sum copies the incoming
    gradient once per summand; the executor's preparation time grows faster than the number of operators. The functions
    used here are not public: where a version of Paddle lacks one, the program stays as it was built, which is slower to
    prepare and computes the same.
    """
    if not in_pir_mode():
        return
    try:
        paddle.base.libpaddle.pir.apply_cse_pass(program)
        block = program.global_block()
        copies = [operator for operator in block.ops if _is_copy(operator)]
        for operator in copies:
            operator.result(0).replace_all_uses_with(operator.operand_source(0))
            block.remove_op(operator)
    except AttributeError:
        pass


def _is_copy(operator) -> bool:
    """Whether a Paddle 3 operator multiplies by the constant 1 and adds 0."""
    if operator.name() != 'pd_op.scale' or operator.attrs()['bias'] != 0.0:
        return False
    factor = operator.operand_source(1).get_defining_op()
    return factor.name() == 'pd_op.full' and factor.attrs()['value'] == 1.0
