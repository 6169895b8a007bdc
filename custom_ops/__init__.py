"""Operators of this project's own for the CPU (README.md in this folder), compiled once and kept in a cache.

`enable()` compiles or finds them and switches them on; programs that are built from then on use them.
Without a compiler, on a GPU, or after `enable(False)` Paddle's own operators compute the same.
"""
import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile

import paddle

import utils

log = logging.getLogger('darts')

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = [os.path.join(HERE, name) for name in ('discrete_cell.cc', 'mixed_cell.cc')]
HEADERS = [os.path.join(HERE, 'kernels.h')]
FLAGS = ['-O3', '-fno-trapping-math', '-march=native', '-fopenmp']

_state = {'enabled': False, 'loaded': False}


def enabled():
    """Whether programs under construction use the operators of this folder."""
    return _state['enabled']


def enable(wanted=True):
    """Switches the operators on or off, -> whether they are on. Why they cannot be is logged."""
    _state['enabled'] = bool(wanted) and _load()
    return _state['enabled']


@contextlib.contextmanager
def without():
    """Paddle's own operators for the programs built meanwhile."""
    before, _state['enabled'] = _state['enabled'], False
    try:
        yield
    finally:
        _state['enabled'] = before


# The operations of the search space that a discrete_cell may have; conv_7x1_1x7 of AmoebaNet is not among them.
OPERATIONS = {'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5', 'sep_conv_7x7',
              'dil_conv_3x3', 'dil_conv_5x5'}


def discrete_cell(x0, x1, running, masks, weights, operations, states, concat, channels, reduction, reduction_prev, training,
                  epsilon, momentum):
    """A cell of a discrete network, as model.Cell builds it otherwise, as one operator.

    x0 [N, C0, H0, W0], x1 [N, C1, H, W]: the outputs of the two cells before (H0 = 2 * H with reduction_prev);
    running [R]: mean, variance of each normalisation; masks: None, or [N, E, 1, 1] that the results of the E edges
    other than identities are multiplied by; weights: a tensor [rows, columns, k, k] for each columns
    and k, and one [R] with scale, shift of each normalisation, their rows as model.Cell declares them; operations: of
    OPERATIONS, two a node; states: that each reads; concat: the states that are the output; training: whether to
    normalise by the batch and to move the running statistics.
    -> the output [N, len(concat) * channels, H', W'] and the running statistics.
    Raises ValueError for a height or width that a reduction cell cannot halve.
    """
    if reduction and (x1.shape[2] % 2 or x1.shape[3] % 2):
        raise ValueError(f"a reduction cell halves height and width, {x1.shape[2]} x {x1.shape[3]} cannot be halved")
    return _build('darts_discrete_cell', {'Inputs@VECTOR': [x0, x1, *weights], 'Running': running,
                                          'Masks': running if masks is None else masks},
                  ['Out', 'Saved', 'Statistics', 'NewRunning'],
                  {'operations': list(operations), 'states': list(states), 'concat': list(concat), 'channels': channels,
                   'reduction': reduction, 'reduction_prev': reduction_prev, 'training': training,
                   'masked': masks is not None, 'epsilon': epsilon, 'momentum': momentum})[::3]


def mixed_cell(x, depthwise3, depthwise5, pointwise, mixing, reduction, weight_gradients, epsilon):
    """All mixed operations of a cell of the supernet, as model_search.Cell builds them otherwise, as one operator.

    x [N, 2 * C, H, W]: both input states; depthwise3 [14 * 3 * C, 1, 3, 3], depthwise5 [14 * 3 * C, 1, 5, 5],
    pointwise [14 * 6 * C, C, 1, 1] (in a reduction cell 8 * C more): its weights in the order of README.md; mixing
    [14, 8]: softmax of alpha; weight_gradients: False leaves the gradients of the weights 0; epsilon: of the batch
    normalisations; -> the four nodes [N, 4 * C, H', W'].
    """
    return _build('darts_mixed_cell', {'X': x, 'Depthwise3': depthwise3, 'Depthwise5': depthwise5,
                                       'Pointwise': pointwise, 'Mixing': mixing}, ['Out', 'Saved', 'Statistics'],
                  {'reduction': reduction, 'weight_gradients': weight_gradients, 'epsilon': epsilon})[0]


def _build(operator, inputs, outputs, attributes):
    """Puts an operator into the program under construction, -> its outputs."""
    if utils.in_pir_mode():
        return paddle._C_ops._run_custom_op(operator, *inputs.values(), *attributes.values())
    from paddle.base.layer_helper import LayerHelper
    helper, first = LayerHelper(operator), next(iter(inputs.values()))
    dtype = (first[0] if isinstance(first, list) else first).dtype
    outputs = {name: helper.create_variable_for_type_inference(dtype) for name in outputs}
    helper.append_op(type=operator, inputs=inputs, outputs=outputs, attrs=attributes)
    return list(outputs.values())


def _load():
    if not _state['loaded']:
        path = library_path()
        if not os.path.isfile(path):
            log.info("compiling the operators for this machine (once, under a minute; --custom_ops False does without)")
            reason = compile_to(path)
            if reason:
                log.warning(f"without operators of its own, the search and the training are slower: {reason}")
                return False
        from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op
        load_op_meta_info_and_register_op(path)
        ctypes.c_int.in_dll(ctypes.CDLL(path), 'darts_threads').value = utils.threads()
        try:
            # One operator after the other: these use all cores themselves.
            paddle.set_flags({'FLAGS_enable_pir_in_executor_trace_run': True})
        except ValueError:
            pass                                       # Paddle 2.6 has no such flag
        _state['loaded'] = True
    return True


def library_path():
    """Where the compiled operators are kept: a file for each source, Paddle, Python and processor."""
    parts = [' '.join(FLAGS).encode()]
    for path in SOURCES + HEADERS:
        with open(path, 'rb') as file:
            parts.append(file.read())
    parts += [each.encode() for each in (paddle.__version__, paddle.version.commit, platform.python_version(),
                                         platform.machine(), _processor_features())]
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(cache, 'darts', hashlib.sha256(b'\0'.join(parts)).hexdigest()[:16], 'darts_ops.so')


def _processor_features():
    """What -march=native looks at; a home folder may be shared by different machines."""
    try:
        with open('/proc/cpuinfo') as file:
            return next((line for line in file if line.startswith(('flags', 'Features'))), '')
    except OSError:
        return platform.processor()


def compile_to(path):
    """Compiles the operators to the file `path` through Paddle's cpp_extension; -> why not, or None.

    In a process of its own: the compilation talks, and changes logging and the working folder.
    """
    if not shutil.which(os.environ.get('CXX', 'g++')):
        return "there is no C++ compiler (on Debian and Ubuntu: apt install g++)"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            done = subprocess.run([sys.executable, '-m', 'custom_ops', os.path.abspath(folder)], text=True,
                                  cwd=os.path.dirname(HERE), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            library = os.path.join(folder, 'darts_ops', 'darts_ops.so')
            if done.returncode or not os.path.isfile(library):
                lines = [line for line in done.stdout.splitlines() if 'rror' in line] or done.stdout.splitlines()
                return f"they could not be compiled ({(lines or ['no output'])[0].strip()[:200]})"
            os.replace(library, path)
    except OSError as error:
        return f"they could not be kept in {os.path.dirname(path)} ({error.strerror or error})"
    return None
