"""The device memory that a static program needs, estimated from the program before its first step.

The estimate follows the executor: it allocates the results of an operator, and frees a tensor after the last operator
that reads it. The largest sum on the way is the memory of all tensors. The context of CUDA, cuDNN's workspaces and the
fragmentation of the allocator come on top, 1 to 2 GB.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from paddle.base.data_feeder import convert_dtype

# Gradients that read their inputs' shapes only: the executor frees these inputs earlier.
READS_SHAPES = {'reshape_grad', 'reshape2_grad', 'flatten_grad', 'flatten_contiguous_range_grad', 'concat_grad',
                'tile_grad', 'expand_grad', 'expand_v2_grad', 'slice_grad', 'sum_grad', 'reduce_sum_grad', 'mean_grad',
                'reduce_mean_grad', 'add_grad', 'elementwise_add_grad'}


class Operation(NamedTuple):
    """An operator of a program: the keys of the tensors that it reads, and {key: bytes} of those that it writes."""
    reads: list
    writes: dict


def estimate(store, batch_size: int) -> float | None:
    """Returns the bytes that the largest program of a programs.VariableStore needs, with the vectors of the store.

    None when a program has a compiled operator: the sizes of what it keeps for its gradient are not in the program.
    """
    if any('darts_' in _name(operator) for part in store.programs for operator in part.program.global_block().ops):
        return None
    vectors = sum(store.get(name).nbytes for name in store.names)
    return vectors + max(peak(operations(program.program, batch_size)) for program in store.programs)


def peak(operations: Iterable[Operation]) -> float:
    """Returns the largest sum of the bytes of all tensors that exist at the same time."""
    operations = list(operations)
    last_use = {key: number for number, operation in enumerate(operations)
                for key in (*operation.writes, *operation.reads)}
    live, total, largest = {}, 0, 0
    for number, operation in enumerate(operations):
        for key, size in operation.writes.items():
            total += size - live.get(key, 0)
            live[key] = size
        largest = max(largest, total)
        for key in {*operation.writes, *operation.reads}:
            if last_use[key] == number:
                total -= live.pop(key, 0)
    return largest


def operations(program, batch_size: int) -> Iterator[Operation]:
    """Yields the operators of a Paddle program that compute something, with `batch_size` in place of the free size."""
    block = program.global_block()
    return _of_paddle3(block, batch_size) if hasattr(program, 'num_ops') else _of_paddle2(block, batch_size)


def _of_paddle3(block, batch_size: int) -> Iterator[Operation]:
    lists: dict[str, list] = {}                     # {key of a list of tensors: keys of the tensors}
    for operator in block.ops:
        name = _name(operator).rpartition('.')[2].rstrip('_')
        operands = operator.operands_source()
        if name in READS_SHAPES:
            operands = [source for source, slot in zip(operands, operator.get_input_names()) if slot == 'out_grad']
        reads = [key for source in operands if source.initialized() for key in lists.get(source.id, [source.id])]
        results = [result for result in operator.results() if result.initialized()]
        if name == 'combine':                       # the operands become a list
            lists[results[0].id] = reads
        elif name == 'split' and operator.name().startswith('builtin'):        # the tensors of a list
            lists.update((result.id, [key]) for result, key in zip(results, reads))
        elif name == 'assign_out':                  # writes a vector of the store
            yield Operation(reads, {})
        elif name not in ('parameter', 'data'):
            writes = {}
            for result in results:
                if result.type().as_vec_type() is None:
                    writes[result.id] = _bytes(result, batch_size)
                else:
                    pieces = result.type().as_vec_type().as_list()
                    lists[result.id] = [f'{result.id} {number}' for number in range(len(pieces))]
                    writes.update(zip(lists[result.id], (_bytes(piece, batch_size) for piece in pieces)))
            yield Operation(reads, writes)


def _of_paddle2(block, batch_size: int) -> Iterator[Operation]:
    for operator in block.ops:
        names = operator.input_arg_names
        if operator.type in READS_SHAPES:
            names = [name for slot in operator.input_names if slot.endswith('@GRAD') for name in operator.input(slot)]
        written = (block.var(name) for name in operator.output_arg_names if block.has_var(name))
        yield Operation(names, {variable.name: _bytes(variable, batch_size) for variable in written
                                if not variable.persistable})


def _name(operator) -> str:
    """Returns the name of the kind of a Paddle operator, of Paddle 3 with its dialect."""
    return operator.name() if callable(getattr(operator, 'name', None)) else operator.type


def _bytes(tensor, batch_size: int) -> int:
    """Returns the bytes of a tensor or type with a shape and a dtype."""
    return np.dtype(convert_dtype(tensor.dtype)).itemsize * math.prod(
        batch_size if size < 0 else size for size in tensor.shape)
