"""Published genotypes, reading and writing, derivation from alpha."""
import json

import numpy as np
import pytest

import genotypes
from genotypes import PRIMITIVES
from utils import UserError

pytestmark = pytest.mark.paddle_free


def test_published_genotypes_are_found_by_name_and_read_back(tmp_path):
    assert set(genotypes.GENOTYPES) == {'NASNet', 'AmoebaNet', 'DARTS_V1', 'DARTS_V2', 'DARTS', 'DARTS_PADDLE',
                                        'FASHION_MNIST_0', 'FASHION_MNIST_1'}
    path = tmp_path / 'genotype.json'
    for name, genotype in genotypes.GENOTYPES.items():
        path.write_text(genotypes.dumps(genotype))
        assert genotypes.load(name) == genotype == genotypes.load(str(path))
    assert genotypes.load('DARTS') is genotypes.load('DARTS_V2')
    nasnet = genotypes.load('NASNet')
    assert len(nasnet.normal) == len(nasnet.reduce) == 10
    assert (nasnet.normal_concat, nasnet.reduce_concat) == ((2, 3, 4, 5, 6), (4, 5, 6))
    paddle = genotypes.load('DARTS_PADDLE')
    assert paddle.normal[:2] == (('dil_conv_3x3', 0), ('sep_conv_3x3', 1))
    assert paddle.reduce[5] == ('dil_conv_5x5', 3) and paddle.reduce_concat == (2, 3, 4, 5)


EDGES = [['skip_connect', 0], ['skip_connect', 1], ['skip_connect', 0], ['skip_connect', 2]]


@pytest.mark.parametrize('reason, field, values', [
    ('list of edges', 'normal', [[], EDGES[:3], 'skip_connect', None]),
    ('edge 0', 'normal', [[[name, 0], EDGES[1]] for name in ('none', 'conv_9x9', ['sep_conv_3x3'])]),
    ('edge 1: state', 'normal', [[EDGES[0], ['skip_connect', state]] for state in (2, -1, True, 0.0, [])]),
    ('edge 2: state 3 is not among the 3 states', 'reduce', [[*EDGES[:2], ['skip_connect', 3], EDGES[3]]]),
    ('normal_concat', 'normal_concat', [[2, 3, 4, 6], [1, 2], [2, 3.0]]),
    ('reduce_concat', 'reduce_concat', [[2, 2], [], {'2': 3}, [[2]]]),
    ('fields have to be', 'extra', [1]),
])
def test_invalid_fields_are_refused(reason, field, values):
    for value in values:
        with pytest.raises(ValueError, match=reason):
            genotypes.check({**genotypes.DARTS_V2._asdict(), field: value})


@pytest.mark.parametrize('content', ['[1, 2]', json.dumps({'normal': EDGES}), '[' * 100000, '\x00\xff'])
def test_invalid_files_are_refused(tmp_path, content):
    path = tmp_path / 'genotype.json'
    path.write_text(content, encoding='latin1')
    with pytest.raises(UserError, match='holds no genotype'):
        genotypes.load(str(path))


def alphas(*strengths):
    """Returns alpha [14, 8]: zero except for the given (edge, operation, value)."""
    table = np.zeros((14, 8))
    for edge, operation, value in strengths:
        table[edge, PRIMITIVES.index(operation)] = value
    return table


def test_each_node_keeps_its_two_strongest_edges_the_stronger_first():
    table = alphas(
        (0, 'sep_conv_3x3', 1.0), (1, 'dil_conv_5x5', 2.0),                                # node 2: states 0, 1
        (2, 'max_pool_3x3', 3.0), (3, 'avg_pool_3x3', 1.0), (4, 'skip_connect', 2.0),      # node 3: 0, 1, 2
        (5, 'sep_conv_5x5', 0.1), (6, 'sep_conv_5x5', 0.2), (7, 'sep_conv_5x5', 0.3), (8, 'dil_conv_3x3', 0.4),
        (9, 'sep_conv_3x3', 0.5), (13, 'skip_connect', 0.6), (13, 'max_pool_3x3', 0.59))    # node 5: 0 to 4
    cell = (('dil_conv_5x5', 1), ('sep_conv_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2),
            ('dil_conv_3x3', 3), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('skip_connect', 4))
    genotype = genotypes.derive(table, alphas((0, 'skip_connect', 1.0)))
    # The second operation on edge 13 takes weight from its first, so the weaker alpha of edge 9 wins.
    assert genotype.normal == cell
    assert genotype.reduce[:2] == (('skip_connect', 0), ('max_pool_3x3', 1))
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


def test_none_is_never_chosen_but_weakens_its_edge_and_with_ties_the_lower_index_wins():
    table = alphas((2, 'none', 9.0), (2, 'sep_conv_3x3', 3.0),       # strong without its dominant none
                   (3, 'sep_conv_5x5', 0.2), (4, 'dil_conv_3x3', 0.1))
    genotype = genotypes.derive(table, alphas(*[(edge, 'none', 5000.0) for edge in range(14)]))      # exp overflows
    assert genotype.normal[2:4] == (('sep_conv_5x5', 1), ('dil_conv_3x3', 2))
    assert genotype.reduce == (('max_pool_3x3', 0), ('max_pool_3x3', 1)) * 4
