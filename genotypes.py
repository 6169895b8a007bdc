"""Genotypes: the published ones by name; reading, writing and checking them; derivation from alpha."""
from __future__ import annotations

import json
import os
from collections import namedtuple

import numpy as np

from utils import UserError

# The operations of the search space, in the order of the columns of alpha.
PRIMITIVES = ('none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect',
              'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5')
# The operations of discrete cells, including those that only published genotypes use.
OPERATIONS = PRIMITIVES[1:] + ('sep_conv_7x7', 'conv_7x1_1x7')

NODES = 4                                            # intermediate nodes of a cell in the search
FIRST_EDGE = tuple(sum(2 + n for n in range(node)) for node in range(NODES))     # 0, 2, 5, 9
EDGES = sum(2 + node for node in range(NODES))       # 14; the edge from state j to node i is FIRST_EDGE[i] + j

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

FASHION_MNIST_0 = _genotype(                         # found by scripts/bench/compare_genotypes.py, seed 0
    'sep_conv_3x3 1 sep_conv_5x5 0  avg_pool_3x3 1 sep_conv_3x3 0  sep_conv_5x5 3 avg_pool_3x3 0 '
    'sep_conv_5x5 0 sep_conv_3x3 4',
    'sep_conv_3x3 1 sep_conv_5x5 0  sep_conv_3x3 2 sep_conv_5x5 1  sep_conv_5x5 1 sep_conv_3x3 3 '
    'sep_conv_5x5 1 sep_conv_3x3 0')

FASHION_MNIST_1 = _genotype(                         # the same, seed 1
    'sep_conv_5x5 0 dil_conv_3x3 1  sep_conv_3x3 2 sep_conv_3x3 1  sep_conv_5x5 2 sep_conv_5x5 0 '
    'sep_conv_5x5 4 sep_conv_3x3 2',
    'sep_conv_3x3 0 sep_conv_3x3 1  sep_conv_5x5 1 sep_conv_5x5 2  sep_conv_5x5 1 dil_conv_5x5 3 '
    'max_pool_3x3 4 max_pool_3x3 1')

GENOTYPES = {'NASNet': NASNet, 'AmoebaNet': AmoebaNet, 'DARTS_V1': DARTS_V1, 'DARTS_V2': DARTS_V2,
             'DARTS': DARTS_V2, 'DARTS_PADDLE': DARTS_PADDLE, 'FASHION_MNIST_0': FASHION_MNIST_0,
             'FASHION_MNIST_1': FASHION_MNIST_1}


def load(name: str) -> Genotype:
    """Returns the genotype with a name of GENOTYPES, or of a genotype.json (the output of `dumps`).

    Raises UserError for a name that is neither, and for a file that holds no valid genotype.
    """
    if name in GENOTYPES:
        return GENOTYPES[name]
    if not os.path.isfile(name):
        raise UserError(f"no genotype {name!r}: give one of {', '.join(sorted(GENOTYPES))}, "
                        "or the path of a genotype.json that a search wrote")
    try:
        with open(name, encoding='utf-8') as file:
            return check(json.loads(file.read(1 << 20)))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{name} holds no genotype: {str(error)[:500]}") from None           # it may quote the file


def of_weights(path: str, metadata: dict, arch: str | None = None) -> Genotype:
    """Returns the genotype of the weight file `path`: that of its metadata, otherwise `arch` (as of `load`).

    Raises UserError when both are missing and when they differ.
    """
    try:
        recorded = check(metadata['genotype']) if metadata.get('genotype') else None
    except ValueError as error:
        raise UserError(f"{path} records no valid genotype: {error}") from None
    genotype = load(arch) if arch else recorded
    if not genotype:
        raise UserError(f"{path} does not record its genotype: give --arch")
    if recorded not in (None, genotype):
        raise UserError(f"{path} was trained with another genotype than {arch}")
    return genotype


def dumps(genotype: Genotype) -> str:
    """Returns a genotype as one line of JSON: its four fields, edges as [operation, state]."""
    return json.dumps(genotype._asdict())


def check(fields: dict) -> Genotype:
    """Returns the Genotype of a mapping with its four fields.

    Raises ValueError for a missing or additional field, an unknown operation, an edge from a state that does not
    precede its node, and a concat that names other states than nodes.
    """
    if not isinstance(fields, dict) or set(fields) != set(Genotype._fields):
        raise ValueError(f"its fields have to be {', '.join(Genotype._fields)}")
    checked = {}
    for cell in ('normal', 'reduce'):
        edges, concat = fields[cell], fields[cell + '_concat']
        if not isinstance(edges, (list, tuple)) or len(edges) % 2 or not edges:
            raise ValueError(f"{cell} has to be a list of edges, two for each node")
        for number, edge in enumerate(edges):
            if not isinstance(edge, (list, tuple)) or len(edge) != 2 or edge[0] not in OPERATIONS:
                raise ValueError(f"{cell} edge {number}, {edge!r}, has to be an operation "
                                 f"({', '.join(OPERATIONS)}) and a state")
            if type(edge[1]) is not int or not 0 <= edge[1] < 2 + number // 2:
                raise ValueError(f"{cell} edge {number}: state {edge[1]!r} is not among the "
                                 f"{2 + number // 2} states before node {number // 2}")
        last = 2 + len(edges) // 2
        if not isinstance(concat, (list, tuple)) or {*map(type, concat)} != {int} \
                or len({*concat} & {*range(2, last)}) < len(concat):
            raise ValueError(f"{cell}_concat {concat!r} has to name different nodes among 2 to {last - 1}")
        checked[cell] = tuple((operation, state) for operation, state in edges)
        checked[cell + '_concat'] = tuple(concat)
    return Genotype(**checked)


def softmax(alphas: np.ndarray) -> np.ndarray:
    """Returns the softmax over the 8 operations of each edge: [..., 14, 8] -> the same shape."""
    weights = np.exp(alphas - np.max(alphas, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def entropy(weights: np.ndarray) -> float:
    """Returns the mean over the edges of -sum p log p, in nats; weights: softmax of alpha [14, 8].

    It falls from log 8 = 2.079, where all operations are equal, to 0, where one operation has all the weight.
    """
    weights = np.asarray(weights, 'float64')
    # 0 log 0 is 0.
    return float(-(weights * np.log(np.maximum(weights, np.finfo('float64').tiny))).sum(axis=-1).mean())


def skip_connects(genotype: Genotype) -> int:
    """Returns the number of skip_connect in the normal cell, towards which searches drift."""
    return sum(operation == 'skip_connect' for operation, _ in genotype.normal)


def edge_names() -> list[str]:
    """Returns 'state to node' of every edge of a cell of the search space, nodes numbered as states."""
    return [f'{state} to {2 + node}' for node in range(NODES) for state in range(2 + node)]


def derive(alphas_normal: np.ndarray, alphas_reduce: np.ndarray) -> Genotype:
    """Returns the genotype of alpha [14, 8] of both kinds of cell (arXiv 1806.09055, section 2.4).

    The strength of an edge is the largest softmax weight among its operations other than none, with the softmax over
    all 8. Each node keeps its two strongest edges, the stronger first, and on each its strongest operation other than
    none. With ties the lower index wins.
    """
    cells = []
    for alphas in (alphas_normal, alphas_reduce):
        weights = softmax(np.asarray(alphas, 'float64'))[:, 1:]          # without none
        edges = []
        for node, first in enumerate(FIRST_EDGE):
            incoming = weights[first:first + 2 + node]                   # [states before the node, 7]
            strongest = np.argsort(-incoming.max(axis=1), kind='stable')[:2]
            edges += [(PRIMITIVES[1 + int(incoming[state].argmax())], int(state)) for state in strongest]
        cells += [tuple(edges), tuple(range(2, 2 + NODES))]
    return Genotype(*cells)
