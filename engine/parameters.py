"""The parameters of a network as one flat vector theta.

An update of a network is then vector arithmetic: nothing loops over parameters, neither in Python nor in a graph.
`FlatParameters` maps the names of the parameters to slices of the vector, and creates views of it for the program under
construction.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import paddle

from utils import UserError


class ParameterGroup:
    """n parameters of equal shape [out, ...] that one batched operation uses as one tensor [n * out, ...].

    tensor: the variable of the program under construction, set by `FlatBuffer.unpack`.
    positions: the number of positions of an image that the parameters are multiplied at in that program.
    fused: the `FusedView` that the group belongs to, or None. A program that takes fused views gives the groups in them
    no tensors of their own.
    """

    def __init__(self, count: int, shape: Sequence[int]):
        self.count, self.shape = count, tuple(shape)
        self.rows, self.trailing_shape = count * self.shape[0], self.shape[1:]
        self.size = self.rows * math.prod(self.trailing_shape)
        self.offset: int | None = None
        self.fused: FusedView | None = None
        self.tensor, self.positions = None, 0


class FusedView:
    """Groups of one trailing shape, declared one after the other, as one `tensor` [all rows, ...] of an operator."""

    def __init__(self, groups: list[ParameterGroup]):
        self.rows = sum(group.rows for group in groups)
        self.tensor = None
        for group in groups:
            group.fused = self


class FlatBuffer:
    """Parameter groups side by side in one flat vector.

    Groups of equal trailing shape (such as all depthwise 3x3 kernels of a network) are neighbours in the vector. A
    program takes all of them with one slice and one reshape and cuts the result along the first axis: a few dozen
    operators instead of one slice and one reshape per parameter.
    """

    def __init__(self):
        self.groups: list[ParameterGroup] = []
        self.size = 0

    def add(self, count: int, shape: Sequence[int]) -> ParameterGroup:
        group = ParameterGroup(count, shape)
        self.groups.append(group)
        return group

    def fused_views(self, first: int) -> dict[tuple, FusedView]:
        """Returns {trailing shape: FusedView} over all groups that were added from number `first` on."""
        return {shape: FusedView(groups) for shape, groups in _by_trailing_shape(self.groups[first:]).items()}

    def assign_offsets(self) -> FlatBuffer:
        """Gives every group its place in the vector, after the last call of `add`; returns self."""
        self._by_shape = _by_trailing_shape(self.groups)
        self.size = 0
        for groups in self._by_shape.values():
            for group in groups:
                group.offset = self.size
                self.size += group.size
        return self

    def unpack(self, vector, fused: bool = False) -> None:
        """Gives every group its tensor: a piece of `vector` ([size], in the program under construction).

        fused: gives every fused view its tensor, and only the groups that are in none theirs.
        """
        self._pieces = []
        slices = split(vector, [sum(group.size for group in groups) for groups in self._by_shape.values()])
        for (shape, groups), rows in zip(self._by_shape.items(), slices):
            if shape:
                rows = paddle.reshape(rows, [-1, *shape])
            pieces = list(dict.fromkeys((fused and group.fused) or group for group in groups))
            for piece, tensor in zip(pieces, split(rows, [piece.rows for piece in pieces])):
                piece.tensor = tensor
            for group in groups:
                group.positions = 0
            self._pieces.append(pieces)

    def pack(self):
        """Returns the vector [size] of all tensors, the inverse of `unpack`."""
        slices = [_concat([piece.tensor for piece in pieces]) for pieces in self._pieces]
        return _concat([paddle.reshape(rows, [-1]) if len(rows.shape) > 1 else rows for rows in slices])


def _by_trailing_shape(groups: list[ParameterGroup]) -> dict[tuple, list[ParameterGroup]]:
    result: dict[tuple, list[ParameterGroup]] = {}
    for group in groups:
        result.setdefault(group.trailing_shape, []).append(group)
    return result


def split(x, sizes: list[int]) -> list:
    """Returns the pieces of x, of `sizes` rows each."""
    return paddle.split(x, sizes, axis=0) if len(sizes) > 1 else [x]


def _concat(pieces: list):
    return paddle.concat(pieces, axis=0) if len(pieces) > 1 else pieces[0]


class ArrangedTable:
    """The entries (row, column) of a table, arranged as scales of channels and as 1x1 kernels.

    An arrangement takes every entry once, so it is the product with a permutation matrix, `permutation`. The gradient
    of a gather would add atomically on GPUs, in a different order, and so with a different rounding, in every run.
    """

    def __init__(self, rows: int, columns: int):
        self.shape = rows, columns
        self._scales: dict[tuple, int] = {}        # {entries (row, column): number}
        self._kernels: dict[tuple, ParameterGroup] = {}

    def add_scales(self, entries: list[tuple]) -> int:
        """Declares entries (row, column) as scales of channels; returns the position of the group in `scales`."""
        return self._scales.setdefault(tuple(entries), len(self._scales))

    def add_kernel(self, nodes: int, entries: list[tuple]) -> ParameterGroup:
        """Declares entries (row, column) as a 1x1 kernel of [nodes] outputs."""
        kernel = ParameterGroup(1, [nodes, len(entries) // nodes, 1, 1])
        return self._kernels.setdefault(tuple(entries), kernel)

    @property
    def permutation(self) -> np.ndarray:
        """The matrix [entries in use, rows * columns] of zeros and ones: scales first, then kernels."""
        entries = [entry for group in (*self._scales, *self._kernels) for entry in group]
        return np.eye(math.prod(self.shape))[[row * self.shape[1] + column for row, column in entries]]

    def unpack(self, table, permutation) -> None:
        """Gives the kernels their tensors, and `scales` its content, in the program under construction.

        table: a variable [rows, columns]; permutation: a variable with the matrix of that name.
        """
        arranged = paddle.matmul(permutation, paddle.reshape(table, [-1, 1]))
        counts = [sum(map(len, self._scales)), *map(len, self._kernels)]
        pieces = iter(split(arranged, [count for count in counts if count]))
        self._column = next(pieces) if self._scales else None        # [scales, 1]
        for kernel in self._kernels.values():
            kernel.tensor, kernel.positions = paddle.reshape(next(pieces), kernel.shape), 0
        self._by_channels = {}

    def scales(self, channels: int) -> list:
        """Returns all groups of scales, each scale repeated `channels` times: [entries * channels]."""
        if not self._scales:
            return []
        if channels not in self._by_channels:
            rows = paddle.expand(self._column, [self._column.shape[0], channels])
            self._by_channels[channels] = paddle.reshape(rows, [-1])
        return split(self._by_channels[channels], [len(entries) * channels for entries in self._scales])


class FlatParameters(FlatBuffer):
    """The named parameters of a network as slices of one vector theta.

    running_statistics: whether the network keeps running means and variances for the evaluation; they form a vector
    `statistics` of their own, otherwise None. training: whether the program under construction normalises by the batch
    and updates the running statistics.
    """

    def __init__(self, running_statistics: bool = False):
        super().__init__()
        self._declared: dict[str, tuple] = {}        # {name: (group, index in the group, bound, value)}
        self.statistics = FlatParameters() if running_statistics else None
        self.training = True

    def declare(self, names: Sequence[str], shape: Sequence[int], bound: float | None = None,
                value: float = 0.0) -> ParameterGroup:
        """Declares len(names) parameters of one shape, used together as one group.

        Initial values are uniform in +-bound. Without a bound they are uniform in +-1 / sqrt(fan_in) with
        fan_in = prod(shape[1:]), and vectors are the constant `value`.
        """
        group = self.add(len(names), shape)
        if bound is None and len(shape) > 1:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
        for index, name in enumerate(names):
            if name in self._declared:
                raise ValueError(f"{name} is declared twice")
            self._declared[name] = (group, index, bound, value)
        return group

    @property
    def shapes(self) -> dict[str, tuple]:
        """{name: shape} of all parameters."""
        return {name: group.shape for name, (group, *_) in self._declared.items()}

    def count(self, without: str | tuple = ()) -> int:
        """Returns the number of weights whose names do not start with `without`, a prefix or a tuple of prefixes."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not name.startswith(without))

    def multiply_adds(self, without: str | tuple = ()) -> int:
        """Returns the multiply-adds per image of the convolutions and linear layers in the program built last."""
        groups = {id(group): group for name, (group, *_) in self._declared.items() if not name.startswith(without)}
        return sum(group.size * group.positions for group in groups.values())

    def create_parameters(self) -> None:
        """Gives every group (of one parameter each) a static parameter with the name of its parameter as tensor."""
        for name, (group, *_) in self._declared.items():
            group.tensor, group.positions = paddle.static.create_parameter(
                group.shape, 'float32', name=name, default_initializer=paddle.nn.initializer.Constant(0.0)), 0

    def slices(self) -> Iterator[tuple[str, slice, tuple]]:
        """Yields (name, slice of theta, shape)."""
        for name, (group, index, *_) in self._declared.items():
            size = group.size // group.count
            start = group.offset + index * size
            yield name, slice(start, start + size), group.shape

    def named(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {name: array} of a flat vector [size]; the arrays are copies."""
        return {name: vector[where].reshape(shape).copy() for name, where, shape in self.slices()}

    def flat(self, weights: dict[str, np.ndarray], vector: np.ndarray) -> np.ndarray:
        """Returns a copy of `vector` [size] with the weights {name: array} in it; other weights keep their values.

        Raises UserError for an unknown name, a wrong shape and numbers that are not real and finite.
        """
        unknown = sorted(set(weights) - set(self._declared))
        if unknown:
            raise UserError(f"unknown weight {unknown[0]!r} ({len(unknown)} unknown in all)")
        vector = vector.copy()
        for name, where, shape in self.slices():
            if name in weights:
                array = np.asarray(weights[name])
                check_finite(name, array)
                if array.shape != shape:
                    raise UserError(f"weight {name} has shape {list(array.shape)}, expected {list(shape)}")
                vector[where] = array.reshape(-1)
        return vector

    def initial(self, rng: np.random.Generator, dtype: str) -> np.ndarray:
        """Returns a vector [size] of initial values, drawn from the numpy generator `rng`."""
        vector = np.empty(self.size, dtype)
        for (_, where, _), (_, _, bound, value) in zip(self.slices(), self._declared.values()):
            size = where.stop - where.start
            vector[where] = value if bound is None else rng.uniform(-bound, bound, size)
        return vector


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError unless the array holds finite real numbers."""
    if array.dtype.kind not in 'fiu' or not np.isfinite(array).all():
        raise UserError(f"{name} does not hold finite real numbers ({array.dtype})")
