"""Compiled operators for the CPU (README.md in this folder), built once per machine and kept in a cache.

`enable()` builds or finds them and switches them on; programs that are built from then on use them. Without a
compiler, on a GPU, or after `enable(False)` Paddle's own operators compute the same function.
"""
from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import engine                      # before paddle
import paddle

import utils
from engine.console import Elapsed

log = logging.getLogger('darts')

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = [os.path.join(HERE, name) for name in (
    'discrete_cell.cc', 'mixed_cell.cc', 'preprocessing.cc', 'outside_cells.cc')]
HEADERS = [os.path.join(HERE, name) for name in ('kernels.h', 'cells.h', 'search_space.h')]
DIGEST_SIZE = hashlib.sha256().digest_size
# -g0: Python's own flags contain -g, and information for a debugger takes a third of the time of compilation.
FLAGS = ['-O3', '-g0', '-fno-trapping-math', '-march=native', '-fopenmp', *os.environ.get('CXXFLAGS', '').split()]

_state = {'enabled': False, 'loaded': False}


def enabled() -> bool:
    """Whether programs under construction use the operators of this folder."""
    return _state['enabled']


def enable(wanted: bool = True) -> bool:
    """Switches the operators on or off and returns whether they are on; logs why they cannot be switched on."""
    _state['enabled'] = bool(wanted) and _load()
    return _state['enabled']


def enabled_for(missing: list[str]) -> bool:
    """Whether a supernet uses `mixed_cell`; logs why not when only the primitives `missing` prevent it."""
    if enabled() and missing:
        log.info(f"{', '.join(missing)}: not among the compiled operators, so Paddle's own compute the cells of the "
                 "supernet, and steps are slower")
    return enabled() and not missing


@contextlib.contextmanager
def disabled():
    """Uses Paddle's own operators for the programs that are built inside the `with` block."""
    before, _state['enabled'] = _state['enabled'], False
    try:
        yield
    finally:
        _state['enabled'] = before


def discrete_cell(x0, x1, running, masks, weights, operations, states, concat, channels, reduction, reduction_prev,
                  training, twice, epsilon, momentum) -> tuple:
    """Adds a cell of a discrete network as one operator; model.Cell.by_operations adds the same function.

    x0 [N, C0, H0, W0], x1 [N, C1, H, W]: outputs of the two cells before (H0 = 2 * H with reduction_prev).
    running [R]: mean and variance of each normalisation. masks: None, or [N, E, 1, 1], factors of the results of the E
    edges other than identities. weights: a tensor [rows, columns, k, k] for each pair (columns, k), and one [R] with
    scale and shift of each normalisation; rows in the order in which model.Cell declares them. operations: names that
    cells.h knows, two per node; states: the input of each; concat: the states in the output; training: whether to
    normalise by the batch and update the running statistics; twice: whether to return the output twice.
    Returns the output [N, len(concat) * channels, H', W'], the same again for a second reader, or None, and the running
    statistics. With a reader each, the operator adds both gradients itself, in a pass that it needs anyway. Both share
    memory: no operator may overwrite them. Raises ValueError for a height or width that a reduction cell cannot halve.
    """
    if reduction and (x1.shape[2] % 2 or x1.shape[3] % 2):
        raise ValueError(f"a reduction cell halves height and width, {x1.shape[2]} x {x1.shape[3]} cannot be halved")
    out, _, _, running, again = _add_operator(
        'darts_discrete_cell', {'Inputs@VECTOR': [x0, x1, *weights], 'Running': running,
                                'Masks': running if masks is None else masks},
        ['Out', 'Saved', 'Statistics', 'NewRunning', 'Again'],
        {'operations': list(operations), 'states': list(states), 'concat': list(concat), 'channels': channels,
         'reduction': reduction, 'reduction_prev': reduction_prev, 'training': training, 'masked': masks is not None,
         'twice': twice, 'epsilon': epsilon, 'momentum': momentum})
    return out, again if twice else None, running


def mixed_cell(x, mixing, weights, primitives, nodes: int, reduction: bool, partial_channels: int,
               weight_gradients: bool, constant_states: int, epsilon: float):
    """Adds all mixed operations of a supernet cell as one operator; model_search.Cell.batched adds the same function.

    x [N, 2 * C, H, W]: both input states; mixing [edges, primitives]: mixing weights, with partial_channels > 1 one
    more column, the weights of the edges; weights: a tensor [rows, columns, k, k] for each pair (columns, k), rows in
    the order of README.md; primitives: names that cells.h knows; weight_gradients: False leaves the gradients of the
    weights 0; constant_states: the number of the first states (0 to 2) whose gradients are not needed, and left 0 like
    those of the weights; epsilon: of the normalisations.
    Returns the nodes [N, nodes * C, H', W'].
    """
    return _add_operator('darts_mixed_cell', {'Inputs@VECTOR': [x, mixing, *weights]}, ['Out', 'Saved', 'Statistics'],
                         {'primitives': list(primitives), 'nodes': nodes, 'reduction': reduction,
                          'partial_channels': partial_channels, 'weight_gradients': weight_gradients,
                          'constant_states': constant_states, 'epsilon': epsilon})[0]


def preprocessing(s0, s1, weights, weight_gradients: bool, constant_states: int, epsilon: float):
    """Adds the preprocessing of both inputs of a supernet cell as one operator.

    s0 [N, C0, H0, W0], s1 [N, C1, H, W]: outputs of the two cells before; weights: the kernels [C, C0, 1, 1] and
    [C, C1, 1, 1], or with H0 = 2 * H the two [C / 2, C0, 1, 1] of FactorizedReduce and [C, C1, 1, 1];
    weight_gradients, constant_states, epsilon: as of `mixed_cell`. Returns [N, 2 * C, H, W]: ReLU, convolution,
    normalisation.
    """
    return _add_operator('darts_preprocessing', {'Inputs@VECTOR': [s0, s1, *weights]}, ['Out', 'Statistics'],
                         {'weight_gradients': weight_gradients, 'constant_states': constant_states,
                          'epsilon': epsilon})[0]


def stem(images, weight, scale, shift, mean, variance, training: bool, weight_gradients: bool, epsilon: float,
         momentum: float) -> tuple:
    """Adds a stem as one operator: 3 x 3 convolution, batch normalisation.

    images [N, C0, H, W], without a gradient; weight [C, C0, 3, 3]; scale, shift, mean, variance [C], the last two the
    running statistics; training, epsilon, momentum: as of `discrete_cell`; weight_gradients: as of `mixed_cell`.
    Returns the output [N, C, H, W] and the running mean and variance.
    """
    out, _, _, mean, variance = _add_operator('darts_stem', {
        'Images': images, 'Weight': weight, 'Scale': scale, 'Shift': shift, 'Mean': mean, 'Variance': variance},
        ['Out', 'Saved', 'Statistics', 'NewMean', 'NewVariance'],
        {'training': training, 'weight_gradients': weight_gradients, 'epsilon': epsilon, 'momentum': momentum})
    return out, mean, variance


def momentum_step(weights, velocity, gradient, numbers: list) -> list:
    """Adds a step of optimizers.MomentumSGD as one operator.

    weights, velocity, gradient: vectors; numbers: momentum, weight decay, rate and, or none, the limit of the norm of
    the gradient, [1] each. Returns the new weights and velocity.
    """
    return _add_operator('darts_momentum_step', {'Weights': weights, 'Velocity': velocity, 'Gradient': gradient,
                                                 'Numbers@VECTOR': numbers}, ['NewWeights', 'NewVelocity'], {})


def _add_operator(operator: str, inputs: dict, outputs: list[str], attributes: dict) -> list:
    """Adds an operator to the program under construction and returns its outputs."""
    if utils.in_pir_mode():
        return paddle._C_ops._run_custom_op(operator, *inputs.values(), *attributes.values())
    from paddle.base.layer_helper import LayerHelper
    helper, first = LayerHelper(operator), next(iter(inputs.values()))
    dtype = (first[0] if isinstance(first, list) else first).dtype
    outputs = {name: helper.create_variable_for_type_inference(dtype) for name in outputs}
    helper.append_op(type=operator, inputs=inputs, outputs=outputs, attrs=attributes)
    return list(outputs.values())


def _load() -> bool:
    if _state['loaded']:
        return True
    if utils.in_pir_mode() and not hasattr(paddle._C_ops, '_run_custom_op'):
        log.warning(f"the compiled operators are off, steps are slower: Paddle {paddle.__version__} lacks a function "
                    "that adds them to a program")
        return False
    path = library_path()
    library, reason = _open(path)
    if not library:
        log.info("compiling the operators for this machine" + (f", because {reason}" if reason else '') +
                 " (once, about a minute on two free cores; --custom_ops False skips it)")
        reason = compile_to(path)
        if not reason:
            library, reason = _open(path)
        if not library:
            log.warning(f"the compiled operators are off, steps are slower: {reason}")
            return False
    from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op
    load_op_meta_info_and_register_op(path)
    ctypes.c_int.in_dll(library, 'darts_threads').value = threads()
    # The products of Paddle's own operators depend on the number of threads (MKL), so one thread computes them.
    paddle.base.core.set_num_threads(1)
    # One operator after the other: each of them uses all cores. Paddle 2.6 has no such flag.
    with contextlib.suppress(ValueError):
        paddle.set_flags({'FLAGS_enable_pir_in_executor_trace_run': True})
    _state['loaded'] = True
    return True


def _open(path: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Returns (library, None), or (None, why it cannot be used); no reason when it does not exist.

    The digest at its end is verified first: loading a library that is cut off ends the process with a signal.
    """
    if not os.path.isfile(path):
        return None, None
    try:
        with open(path, 'rb') as file:
            content = file.read()
        if content != _with_digest(content[:-DIGEST_SIZE]):
            return None, f"{path} is damaged"
        return ctypes.CDLL(path), None
    except OSError as error:                                   # also one of another system, which lacks a symbol
        return None, f"{path} cannot be loaded ({str(error)[:200]})"


def _with_digest(library: bytes) -> bytes:
    """Returns the content of a library followed by its digest, which the loader of the system ignores."""
    return library + hashlib.sha256(library).digest()


def threads() -> int:
    """Returns the number of threads of an operator: OMP_NUM_THREADS if the user has set it, otherwise the cores of the
    machine divided by the processes that paddle.distributed.launch has started on it.

    launch sets OMP_NUM_THREADS to 1, so 1 counts as not set there.
    """
    processes = int(os.environ.get('PADDLE_LOCAL_SIZE', 0))
    if engine.OMP_NUM_THREADS.isdigit() and int(engine.OMP_NUM_THREADS) > (processes > 0):
        return int(engine.OMP_NUM_THREADS)
    return max(1, utils.cores() // max(1, processes))


def library_path() -> str:
    """Returns the path of the compiled operators: one file per source, flags, Paddle, Python and processor."""
    parts = [' '.join(FLAGS).encode()]
    for path in SOURCES + HEADERS:
        with open(path, 'rb') as file:
            parts.append(file.read())
    parts += [each.encode() for each in (paddle.__version__, paddle.version.commit, platform.python_version(),
                                         platform.machine(), _processor_features())]
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(cache, 'darts', hashlib.sha256(b'\0'.join(parts)).hexdigest()[:16], 'darts_ops.so')


def _processor_features() -> str:
    """Returns what -march=native depends on: different machines may share a home folder."""
    try:
        with open('/proc/cpuinfo') as file:
            return next((line for line in file if line.startswith(('flags', 'Features'))), '')
    except OSError:
        return platform.processor()


def compile_to(path: str) -> str | None:
    """Compiles the operators to the file `path` with Paddle's cpp_extension; returns the reason of a failure, or None.

    Compiles in a subprocess: cpp_extension prints, and changes the logging and the working folder of its process.
    """
    compiler = shlex.split(os.environ.get('CXX', 'g++')) or ['g++']
    if not shutil.which(compiler[0]):
        return f"there is no C++ compiler {compiler[0]} (on Debian and Ubuntu: apt install g++)"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder, \
                open(os.path.join(folder, 'output'), 'w+', errors='replace') as output, \
                Elapsed('compiling the operators') as elapsed:
            # Most versions of setuptools compile C++ with CC, and use CXX to link only.
            process = subprocess.Popen([sys.executable, '-m', 'engine.custom_ops', folder],
                                       env={**os.environ, 'CC': shlex.join(compiler), 'CXX': shlex.join(compiler)},
                                       cwd=os.path.dirname(os.path.dirname(HERE)), stdout=output, stderr=output)
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.3)
                elapsed.update(0)
            library = os.path.join(folder, 'darts_ops.so')
            if process.returncode or not os.path.isfile(library):
                output.seek(0)
                lines = output.read().splitlines()
                lines = [line for line in lines if 'rror' in line] or lines
                return f"they could not be compiled ({(lines or ['no output'])[0].strip()[:200]})"
            with open(library, 'rb') as file:
                utils.write_file(path, _with_digest(file.read()))
    except OSError as error:
        return f"they could not be kept in {os.path.dirname(path)} ({error.strerror or error})"
    return None
