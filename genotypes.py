"""Search spaces and genotypes: the published ones by name; reading, writing and checking them; derivation."""
from __future__ import annotations

import ast
import json
import os
import re
from collections import namedtuple
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from utils import UserError, read_text

NONE = 'none'                                        # the primitive that is zero; a derivation never chooses it


@dataclass(frozen=True)
class SearchSpace:
    """The operations that compete on every edge of a cell, and the number of its intermediate nodes.

    primitives: names of operations.OPERATIONS, in the order of the columns of alpha. nodes: node i has an edge from
    each of the 2 + i states before it; the edges are numbered by node, then by state, and are the rows of alpha.
    Raises UserError for duplicates, for a space without an operation other than none, and for fewer than one node.
    """
    primitives: tuple[str, ...]
    nodes: int = 4

    def __post_init__(self):
        object.__setattr__(self, 'primitives', tuple(self.primitives))        # the way to set a field of a frozen class
        if not all(isinstance(name, str) and name for name in self.primitives):
            raise UserError(f"primitives {list(self.primitives)}: each has to be the name of an operation")
        duplicates = sorted({name for name in self.primitives if self.primitives.count(name) > 1})
        if duplicates:
            raise UserError(f"primitives {','.join(self.primitives)}: {', '.join(duplicates)} occurs more than once")
        if not set(self.primitives) - {NONE}:
            raise UserError(f"primitives {','.join(self.primitives) or '(empty)'}: at least one operation other than "
                            f"{NONE} is needed")
        if type(self.nodes) is not int or self.nodes < 1:
            raise UserError(f"nodes is {self.nodes!r}, but a cell needs at least 1 node")

    def __str__(self) -> str:
        return f"{self.nodes} nodes, {','.join(self.primitives)}"

    @classmethod
    def of(cls, fields: dict) -> SearchSpace:
        """Returns the space of a mapping from `as_dict`; raises ValueError for any other value."""
        try:
            return cls(**fields)
        except (TypeError, UserError) as error:
            raise ValueError(f"it records no search space: {str(error)[:300]}") from None        # it may quote the file

    def as_dict(self) -> dict:
        """Returns {'primitives': [names], 'nodes': number}, the form of the space in files."""
        return {'primitives': list(self.primitives), 'nodes': self.nodes}

    @property
    def edges(self) -> int:
        """The number of edges of a cell: 14 with 4 nodes."""
        return self.nodes * (self.nodes + 3) // 2

    @property
    def first_edges(self) -> tuple[int, ...]:
        """The first edge of each node: the edge from state j to node i is first_edges[i] + j."""
        return tuple(node * (node + 3) // 2 for node in range(self.nodes))

    @property
    def state_groups(self) -> tuple[tuple[int, ...], ...]:
        """The states whose edges are computed together: both inputs, then each node except the last."""
        return ((0, 1), *((state,) for state in range(2, 1 + self.nodes)))

    @property
    def edge_names(self) -> list[str]:
        """'state to node' of every edge, nodes numbered as states."""
        return [f'{state} to {2 + node}' for node in range(self.nodes) for state in range(2 + node)]

    @property
    def node_names(self) -> list[str]:
        """'node N' of every node, numbered as a state."""
        return [f'node {2 + node}' for node in range(self.nodes)]

    @property
    def state_names(self) -> list[str]:
        """'state N' of every state that has edges."""
        return [f'state {state}' for state in range(1 + self.nodes)]

    def by_node(self, values: np.ndarray) -> list[list[float]]:
        """Returns values [edges] as one list per node, with the value of its edge from each state before it."""
        return [values[first:first + 2 + node].tolist() for node, first in enumerate(self.first_edges)]

    def check_recorded(self, path: str, recorded: SearchSpace) -> None:
        """Raises UserError unless `recorded`, the space of the file `path`, is this space."""
        if recorded != self:
            raise UserError(f"{path} is of another search space: {recorded} there, {self} now; "
                            "give its --primitives and --nodes")


# The space of the paper (arXiv 1806.09055, section 3.1).
DARTS_SPACE = SearchSpace((NONE, 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect',
                           'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5'), nodes=4)


def recorded_space(path: str, metadata: dict) -> SearchSpace:
    """Returns the space in the metadata of the file `path`; raises UserError when they hold anything else there.

    Files without a space are of version 0.1 or from another project; they are taken for the space of the paper.
    """
    try:
        return SearchSpace.of(metadata['space']) if 'space' in metadata else DARTS_SPACE
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
Genotype.__doc__ = """A normal and a reduction cell. normal, reduce: two edges (operation, state) per node, nodes
in order; states 0 and 1 are the outputs of the two cells before, state 2 + i is node i. *_concat: the states whose
concatenation is the output of the cell."""


def _genotype(normal, reduce, normal_concat=(2, 3, 4, 5), reduce_concat=(2, 3, 4, 5)):
    def edges(text):
        words = text.split()
        return tuple(zip(words[::2], map(int, words[1::2])))
    return Genotype(edges(normal), tuple(normal_concat), edges(reduce), tuple(reduce_concat))


NASNet = _genotype(                                  # arXiv 1707.07012
    'sep_conv_5x5 1 sep_conv_3x3 0  sep_conv_5x5 0 sep_conv_3x3 0  avg_pool_3x3 1 skip_connect 0 '
    'avg_pool_3x3 0 avg_pool_3x3 0  sep_conv_3x3 1 skip_connect 1',
    'sep_conv_5x5 1 sep_conv_7x7 0  max_pool_3x3 1 sep_conv_7x7 0  avg_pool_3x3 1 sep_conv_5x5 0 '
    'skip_connect 3 avg_pool_3x3 2  sep_conv_3x3 2 max_pool_3x3 1',
    normal_concat=(2, 3, 4, 5, 6), reduce_concat=(4, 5, 6))

AmoebaNet = _genotype(                               # arXiv 1802.01548
    'avg_pool_3x3 0 max_pool_3x3 1  sep_conv_3x3 0 sep_conv_5x5 2  sep_conv_3x3 0 avg_pool_3x3 3 '
    'sep_conv_3x3 1 skip_connect 1  skip_connect 0 avg_pool_3x3 1',
    'avg_pool_3x3 0 sep_conv_3x3 1  max_pool_3x3 0 sep_conv_7x7 2  sep_conv_7x7 0 avg_pool_3x3 1 '
    'max_pool_3x3 0 max_pool_3x3 1  conv_7x1_1x7 0 sep_conv_3x3 5',
    normal_concat=(4, 5, 6), reduce_concat=(3, 4, 6))

DARTS_V1 = _genotype(                                # arXiv 1806.09055, first order
    'sep_conv_3x3 1 sep_conv_3x3 0  skip_connect 0 sep_conv_3x3 1  skip_connect 0 sep_conv_3x3 1 '
    'sep_conv_3x3 0 skip_connect 2',
    'max_pool_3x3 0 max_pool_3x3 1  skip_connect 2 max_pool_3x3 0  max_pool_3x3 0 skip_connect 2 '
    'skip_connect 2 avg_pool_3x3 0')

DARTS_V2 = _genotype(                                # arXiv 1806.09055, second order
    'sep_conv_3x3 0 sep_conv_3x3 1  sep_conv_3x3 0 sep_conv_3x3 1  sep_conv_3x3 1 skip_connect 0 '
    'skip_connect 0 dil_conv_3x3 2',
    'max_pool_3x3 0 max_pool_3x3 1  skip_connect 2 max_pool_3x3 1  max_pool_3x3 0 skip_connect 2 '
    'skip_connect 2 max_pool_3x3 1')

DARTS_PADDLE = _genotype(                            # found by the PaddlePaddle port of DARTS
    'dil_conv_3x3 0 sep_conv_3x3 1  sep_conv_3x3 0 sep_conv_3x3 1  sep_conv_3x3 1 sep_conv_3x3 0 '
    'skip_connect 0 sep_conv_3x3 1',
    'skip_connect 1 max_pool_3x3 0  max_pool_3x3 1 skip_connect 2  skip_connect 2 dil_conv_5x5 3 '
    'skip_connect 2 max_pool_3x3 1')

PC_DARTS_CIFAR = _genotype(                          # arXiv 1907.05737, searched on CIFAR-10
    'sep_conv_3x3 1 skip_connect 0  sep_conv_3x3 0 dil_conv_3x3 1  sep_conv_5x5 0 sep_conv_3x3 1 '
    'avg_pool_3x3 0 dil_conv_3x3 1',
    'sep_conv_5x5 1 max_pool_3x3 0  sep_conv_5x5 1 sep_conv_5x5 2  sep_conv_3x3 0 sep_conv_3x3 3 '
    'sep_conv_3x3 1 sep_conv_3x3 2')

PC_DARTS_IMAGENET = _genotype(                       # the same, searched on ImageNet
    'skip_connect 1 sep_conv_3x3 0  sep_conv_3x3 0 skip_connect 1  sep_conv_3x3 1 sep_conv_3x3 3 '
    'sep_conv_3x3 1 dil_conv_5x5 4',
    'sep_conv_3x3 0 skip_connect 1  dil_conv_5x5 2 max_pool_3x3 1  sep_conv_3x3 2 sep_conv_3x3 1 '
    'sep_conv_5x5 0 sep_conv_3x3 3')

FASHION_MNIST = _genotype(                           # scripts/bench/experiment.sh, its most accurate searched genotype
    'dil_conv_3x3 0 dil_conv_5x5 1  dil_conv_5x5 2 sep_conv_3x3 1  dil_conv_5x5 3 max_pool_3x3 1  '
    'sep_conv_5x5 1 max_pool_3x3 3',
    'sep_conv_5x5 1 sep_conv_3x3 0  dil_conv_3x3 2 dil_conv_3x3 1  max_pool_3x3 0 max_pool_3x3 3  '
    'sep_conv_5x5 0 skip_connect 1')

DARTS = DARTS_V2


def named() -> dict[str, Genotype]:
    """Returns {name: genotype} of all genotypes that this file defines, also of those that users paste into it."""
    return {name: value for name, value in globals().items() if isinstance(value, Genotype)}


def load(source: str, known: Collection[str] | None = None) -> Genotype:
    """Returns the genotype with a name in this file, of a file that `parse` reads, or of such a text itself.

    known: as of `check`. Raises UserError when `source` is none of them and when the genotype is invalid.
    """
    source = os.fspath(source)
    try:
        if source in named():
            return check(named()[source]._asdict(), known)
        if os.path.isfile(source):
            return parse(read_text(source, 1 << 20), known)
        if 'Genotype(' in source or source.lstrip().startswith('{'):
            return parse(source, known)
    except (ValueError, RecursionError) as error:
        # The reason may quote a file.
        raise UserError(f"{_short(source)} holds no genotype: {str(error)[:500]}") from None
    raise UserError(f"no genotype {_short(source)!r}: give one of {', '.join(sorted(named()))}, the path of a "
                    "genotype.json of a search, or Genotype(normal=..., ...) as a quoted text or in a file")


def _short(source: str) -> str:
    """Returns the name, path or text of a genotype on one line."""
    return ' '.join(source.split())[:200]


def parse(text: str, known: Collection[str] | None = None) -> Genotype:
    """Returns the genotype in a text: the JSON of `dumps`, or Genotype(normal=..., ...) as in Python code and logs.

    In Python, concats may be a range, and edges may be nested per node; nothing is evaluated. known: as of `check`.
    Raises ValueError when there is no genotype, an invalid one, or several different ones.
    """
    if text.lstrip().startswith('{'):
        return check(json.loads(text), known)
    found = []
    for match in re.finditer(r'\bGenotype\s*\(', text):
        genotype = check(_fields(_expression(text, match.start())), known)
        if genotype not in found:
            found.append(genotype)
    if not found:
        raise ValueError("it is neither JSON nor has it Genotype(normal=..., normal_concat=..., ...)")
    if len(found) > 1:
        raise ValueError(f"it has {len(found)} different genotypes: keep one of them")
    return found[0]


def _expression(text: str, start: int) -> str:
    """Returns the part of a text from `start` to the parenthesis that closes the first one."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] in '([{') - (text[end] in ')]}')
        if depth == 0 and text[end] == ')':
            return text[start:end + 1]
    raise ValueError("its parentheses are not closed")


def _fields(expression: str) -> dict:
    """Returns the fields of an expression Genotype(...), read from its syntax tree."""
    try:
        call = ast.parse(expression, mode='eval').body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"it is not an expression of Python ({error})") from None
    if not isinstance(call, ast.Call):
        raise ValueError("it is not Genotype(normal=..., normal_concat=..., ...)")
    fields = dict(zip(Genotype._fields, map(_value, call.args)))
    for keyword in call.keywords:
        if keyword.arg in fields or keyword.arg is None:
            raise ValueError(f"it has the field {keyword.arg!r} twice")
        fields[keyword.arg] = _value(keyword.value)
    if len(call.args) > len(Genotype._fields):
        raise ValueError(f"it has {len(call.args)} fields")
    return fields


def _value(node: ast.AST) -> object:
    """Returns the value of a syntax tree of lists, tuples, constants, ranges and NumPy's integers."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Constant):
        return node.value
    name = node.func if isinstance(node, ast.Call) and not node.keywords else None
    name = name.attr if isinstance(name, ast.Attribute) else getattr(name, 'id', None)         # np.int64(1)
    if name in ('range', 'list', 'tuple', 'int', 'int32', 'int64'):
        values = [_value(argument) for argument in node.args]
        if name == 'range' and 1 <= len(values) <= 3 and {*map(type, values)} == {int} and values[2:] != [0] \
                and max(map(abs, values)) < 1000:
            return range(*values)
        if name != 'range' and len(values) == 1:
            return values[0]
    raise ValueError(f"its part {ast.dump(node)[:100]} is neither a list nor an operation nor a number")


def of_weights(path: str, metadata: dict, arch: str | None = None, known: Collection[str] | None = None) -> Genotype:
    """Returns the genotype of the weight file `path`: that of its metadata, otherwise `arch` (as of `load`).

    known: as of `check`. Raises UserError when both are missing and when they differ.
    """
    try:
        recorded = check(metadata['genotype'], known) if metadata.get('genotype') else None
    except ValueError as error:
        raise UserError(f"{path} records no valid genotype: {error}") from None
    genotype = load(arch, known) if arch else recorded
    if not genotype:
        raise UserError(f"{path} does not record its genotype: give --arch")
    if recorded not in (None, genotype):
        name = next((name for name, value in named().items() if value == recorded), 'another genotype')
        raise UserError(f"{path} was trained with {name}, not with {_short(arch)}: {_difference(recorded, genotype)}; "
                        "leave out --arch")
    return genotype


def _difference(recorded: Genotype, given: Genotype) -> str:
    """Returns the first difference of two genotypes as a phrase."""
    for field, there, here in zip(Genotype._fields, recorded, given):
        if there != here and (field.endswith('_concat') or len(there) != len(here)):
            return f"{field} is {str(there)[:150]} there, {str(here)[:150]} in --arch"
        for number, pair in enumerate(zip(there, here)):
            if pair[0] != pair[1]:
                return f"{field} edge {number} is {pair[0]} there, {pair[1]} in --arch"
    raise ValueError("the genotypes are equal")


def dumps(genotype: Genotype) -> str:
    """Returns a genotype as one line of JSON: its four fields, edges as [operation, state]."""
    return json.dumps(genotype._asdict())


def check(fields: dict, known: Collection[str] | None = None) -> Genotype:
    """Returns the Genotype of a mapping with its four fields; edges may be nested per node, a concat may be a range.

    known: the names of operations that can be built, usually operations.OPERATIONS; None accepts every name, for a
    drawing. Raises ValueError for a missing or additional field, an unknown operation, an edge from a state that does
    not precede its node, and a concat that names other states than nodes.
    """
    if not isinstance(fields, dict) or set(fields) != set(Genotype._fields):
        raise ValueError(f"its fields have to be {', '.join(Genotype._fields)}")
    checked = {}
    for cell in ('normal', 'reduce'):
        edges, concat = _flat(fields[cell]), fields[cell + '_concat']
        if not isinstance(edges, (list, tuple)) or len(edges) % 2 or not edges:
            raise ValueError(f"{cell} has to be a list of edges, two for each node")
        for number, edge in enumerate(edges):
            if not isinstance(edge, (list, tuple)) or len(edge) != 2 or not isinstance(edge[0], str) or not edge[0] \
                    or edge[0] not in (known or edge):
                names = f" ({', '.join(known)})" if known else ''
                raise ValueError(f"{cell} edge {number}, {edge!r}, has to be an operation{names} and a state")
            if type(edge[1]) is not int or not 0 <= edge[1] < 2 + number // 2:
                raise ValueError(f"{cell} edge {number}: state {edge[1]!r} is not among the "
                                 f"{2 + number // 2} states before node {number // 2}")
        last = 2 + len(edges) // 2
        if not isinstance(concat, (list, tuple, range)) or not 0 < len(concat[:last]) == len(concat) \
                or {*map(type, concat)} != {int} or len({*concat} & {*range(2, last)}) < len(concat):
            raise ValueError(f"{cell}_concat {concat!r} has to name different nodes among 2 to {last - 1}")
        checked[cell] = tuple((operation, state) for operation, state in edges)
        checked[cell + '_concat'] = tuple(concat)
    return Genotype(**checked)


def _flat(edges: object) -> object:
    """Returns edges that are nested per node, [[(operation, state), ...], ...], as one list; others unchanged."""
    def is_list(value):
        return isinstance(value, (list, tuple))
    nested = is_list(edges) and edges and all(is_list(node) and node and all(map(is_list, node)) for node in edges)
    if nested and any(len(node) != 2 for node in edges):
        raise ValueError("it has a node without exactly two edges")
    return [edge for node in edges for edge in node] if nested else edges


def entropy(weights: np.ndarray) -> float:
    """Returns the mean over the edges of -sum p log p, in nats; weights: mixing weights [edges, primitives].

    It falls from the logarithm of the number of primitives, where all are equal, to 0, where one has all the weight.
    """
    weights = np.asarray(weights, 'float64')
    # 0 log 0 is 0.
    return float(-(weights * np.log(np.maximum(weights, np.finfo('float64').tiny))).sum(axis=-1).mean())


def skip_connects(genotype: Genotype) -> int:
    """Returns the number of skip_connect in the normal cell, towards which searches drift."""
    return sum(operation == 'skip_connect' for operation, _ in genotype.normal)


def draw(space: SearchSpace, seed: int) -> Genotype:
    """Draws a genotype uniformly from the search space: two different states per node, any operation except none."""
    rng, operations = np.random.default_rng(seed), [name for name in space.primitives if name != NONE]

    def cell():
        return tuple((str(rng.choice(operations)), int(state))
                     for node in range(space.nodes) for state in sorted(rng.choice(2 + node, 2, replace=False)))
    concat = tuple(range(2, 2 + space.nodes))
    return Genotype(cell(), concat, cell(), concat)


def derive(space: SearchSpace, normal: np.ndarray, reduce: np.ndarray) -> Genotype:
    """Returns the genotype of the mixing weights [edges, primitives] of both cells (arXiv 1806.09055, section 2.4).

    The strength of an edge is the largest weight among its operations other than none. Each node keeps its two
    strongest edges, the stronger first, and on each its strongest operation other than none. With ties the lower index
    wins.
    """
    columns = [k for k, name in enumerate(space.primitives) if name != NONE]
    cells = []
    for weights in (normal, reduce):
        edges = []
        for node, first in enumerate(space.first_edges):
            incoming = np.asarray(weights)[first:first + 2 + node, columns]          # [states before the node, columns]
            strongest = np.argsort(-incoming.max(axis=1), kind='stable')[:2]
            edges += [(space.primitives[columns[incoming[state].argmax()]], int(state)) for state in strongest]
        cells += [tuple(edges), tuple(range(2, 2 + space.nodes))]
    return Genotype(*cells)
