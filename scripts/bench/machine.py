"""The parts of the benchmark that relate steps to the machine: its matrix rate, phases of a step, another busy process.

The arithmetic of a step is counted in static programs: the edge-by-edge definition of the supernet, and the discrete
network with Paddle's own operators. Nothing is run for it.
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys

from sides import SEARCH_SIZES, TRAINING_SIZES, Side, alternate, make_network, medians, steps_of    # before engine

import engine  # noqa: F401  before paddle
import paddle

from edge_by_edge import forward
from engine import custom_ops
from engine.programs import StaticProgram, VariableStore
from reference import supernet

# Computes until its parent has ended, which would otherwise leave it running when it is killed.
BUSY = """import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""
PRODUCT = 2048                  # rows and columns of the matrices whose product gives the matrix rate

# {product of an input and weights: the names of input, weights and result in an operator of Paddle 2}
PRODUCTS = {'matmul': ('X', 'Y', 'Out'), 'matmul_v2': ('X', 'Y', 'Out')}
PRODUCTS['conv2d'] = PRODUCTS['depthwise_conv2d'] = 'Input', 'Filter', 'Output'

# The passes of a step: with the gradient of the weights, and with that of alpha alone (runs 4 and 5 of architect.py).
PASSES = {'second order': {'weights': 3, 'alphas': 2}, 'first order': {'weights': 1, 'alphas': 1},
          'training': {'weights': 1}}


# ---------------------------------------------------------------------------------------------------
# Arithmetic

def multiply_adds(program, differentiated: set[str]) -> int:
    """Returns the multiply-adds of convolutions and classifier, for one image, in a forward and backward pass.

    program: a static program, of which only the forward operators count; differentiated: the names of the parameters
    whose gradients are needed. An operator counts once, once more if its input depends on these parameters, and once
    more if its weights do: the gradients of input and weights take as many multiply-adds as the result.
    """
    total, dependent = 0, set(differentiated)
    for operands, results, shapes in _operators(program):
        needed = [key in dependent for key in operands]
        if any(needed):
            dependent.update(results)
        if shapes:
            # [N, C, H, W] by [out, C / groups, k, k] -> [N, out, H', W'], or [N, ..., features] by [out, features]
            _, weights, result = shapes
            places = result[2:] if len(weights) == 4 else result[1:-1]
            total += math.prod(weights) * math.prod(places) * (1 + sum(needed))
    return total


def _operators(program):
    """Yields (keys of operands, keys of results, shapes) of each operator; the key of a parameter is its name.

    shapes: those of input, weights and result of a product, () for any other operator.
    """
    block, names = program.global_block(), {}
    for operator in block.ops:
        if hasattr(program, 'num_ops'):                                            # Paddle 3
            operands = [value for value in operator.operands_source() if value.initialized()]
            results = [value for value in operator.results() if value.initialized()]
            kind = operator.name().rpartition('.')[2]
            if kind == 'parameter':
                names[results[0].id] = operator.attrs()['parameter_name']
            keys = [[names.get(value.id, value.id) for value in values] for values in (operands, results)]
            values = (*operands[:2], *results[:1])
        else:
            # Without running statistics that are overwritten: several normalisations share these constants.
            kind, operands = operator.type, operator.input_arg_names
            keys = operands, [name for name in operator.output_arg_names if name not in operands]
            if kind in PRODUCTS:
                *slots, output = PRODUCTS[kind]
                keys = [name for slot in slots for name in operator.input(slot)], operator.output(output)
                values = map(block.var, (*keys[0], *keys[1]))
        yield *keys, [value.shape for value in values] if kind in PRODUCTS else ()


@functools.cache
def passes(task: str, channels: int, layers: int) -> dict[str, int]:
    """Returns {gradients: multiply-adds of a pass for one image}; the gradients are those of `PASSES`."""
    if task == 'training':
        with custom_ops.disabled():
            return {'weights': multiply_adds(make_network(channels, layers)._run.program, {'theta'})}
    program = StaticProgram(VariableStore(paddle.CPUPlace()), lambda: [forward(channels, 10, layers)[0]]).program
    return {'weights': multiply_adds(program, set(supernet.weight_shapes(channels, 10, layers))),
            'alphas': multiply_adds(program, {'alphas_normal', 'alphas_reduce'})}


def operations(task: str, channels: int, layers: int, batch_size: int, unrolled: bool = True) -> int:
    """Returns the floating-point operations that a step of a side needs by its definition, two per multiply-add."""
    kind = task if task == 'training' else 'second order' if unrolled else 'first order'
    counts = passes(task, channels, layers)
    return 2 * batch_size * sum(number * counts[gradients] for gradients, number in PASSES[kind].items())


# ---------------------------------------------------------------------------------------------------
# Parts

def machine(args) -> list[dict]:
    """The share of the machine's matrix rate that each step reaches, and its time by phases.

    The rate is that of the fastest of all products of large matrices, one after each round of each step.
    """
    steps = steps_of('search', args.sizes) + steps_of('training', args.sizes)
    product, products, times, phases = Side('matrix_product', size=PRODUCT), [], [], []
    for _, task, settings in steps:
        side = Side(f'project_{task}', **settings)
        seconds = alternate({'project': side.step, 'product': product.step}, args.rounds)
        side.end()
        products += seconds.pop('product')
        times.append(medians(seconds))
        side = Side('project_phases', task=task, **settings)
        side.end()
        phases.append(side.answer['percent'])
    product.end()
    rate = 2 * PRODUCT ** 3 / min(products)
    rows = [{'what': f'matrix rate, product of {PRODUCT} x {PRODUCT}', 'unit': 'GFLOP/s', 'project': rate / 1e9}]
    for (what, task, settings), time, percent in zip(steps, times, phases):
        seconds = operations(task, **settings) / rate
        rows += [{'what': f'{what}, time', 'unit': 's', **time},
                 {'what': f'{what}, arithmetic', 'unit': 'GFLOP', 'project': seconds * rate / 1e9},
                 {'what': f'{what}, time at the matrix rate', 'unit': 's', 'project': seconds},
                 {'what': f'{what}, share of the matrix rate', 'unit': '%', 'project': 100 * seconds / time['project']}]
        rows += [{'what': f'{what}, {phase}', 'unit': '% of time', 'project': value}
                 for phase, value in percent.items()]
    return rows


@contextlib.contextmanager
def busy_process():
    """Starts a process that computes without a pause, and stops it; returns meanwhile(function), which continues it
    during a call of the function.
    """
    with subprocess.Popen([sys.executable, '-c', BUSY]) as process:
        os.kill(process.pid, signal.SIGSTOP)

        def meanwhile(function):
            os.kill(process.pid, signal.SIGCONT)
            function()
            os.kill(process.pid, signal.SIGSTOP)
        try:
            yield meanwhile
        finally:
            process.kill()


def shared(args) -> list[dict]:
    """The time of a search step and of a training step while another process computes, next to that alone."""
    rows = []
    steps = steps_of('search', args.sizes or SEARCH_SIZES[:1]) + steps_of('training', args.sizes or TRAINING_SIZES[:1])
    with busy_process() as meanwhile:
        for what, task, settings in steps:
            side = Side(f'project_{task}', **settings)
            seconds = alternate({'project': lambda step=side.step: meanwhile(step), 'peer': side.step}, args.rounds)
            side.end()
            rows.append({'what': f'{what}, with a busy process', 'unit': 's', **medians(seconds), 'peer is': 'alone'})
    return rows
