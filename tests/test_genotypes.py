"""Published genotypes, reading and writing, derivation from alpha."""
import json

import numpy as np
import pytest

import genotypes
from genotypes import PRIMITIVES
from utils import UserError

pytestmark = pytest.mark.paddle_free


def test_published_genotypes_by_name():
    assert set(genotypes.GENOTYPES) == {'NASNet', 'AmoebaNet', 'DARTS_V1', 'DARTS_V2', 'DARTS', 'DARTS_PADDLE',
                                        'FASHION_MNIST_0', 'FASHION_MNIST_1'}
    for name, genotype in genotypes.GENOTYPES.items():
        assert genotypes.load(name) == genotype == genotypes.check(genotype._asdict())
    assert genotypes.load('DARTS') is genotypes.load('DARTS_V2')
    nasnet = genotypes.load('NASNet')
    assert len(nasnet.normal) == len(nasnet.reduce) == 10
    assert (nasnet.normal_concat, nasnet.reduce_concat) == ((2, 3, 4, 5, 6), (4, 5, 6))
    paddle = genotypes.load('DARTS_PADDLE')
    assert paddle.normal[:2] == (('dil_conv_3x3', 0), ('sep_conv_3x3', 1))
    assert paddle.reduce[5] == ('dil_conv_5x5', 3) and paddle.reduce_concat == (2, 3, 4, 5)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match='AmoebaNet, DARTS, DARTS_PADDLE'):
        genotypes.load('DARTS_V3')


def test_a_saved_genotype_is_read_back(tmp_path):
    path = tmp_path / 'genotype.json'
    for genotype in genotypes.GENOTYPES.values():
        path.write_text(genotypes.dumps(genotype))
        assert genotypes.load(str(path)) == genotype


def fields(**changes):
    return dict(json.loads(genotypes.dumps(genotypes.DARTS_V2)), **changes)


EDGES = [['skip_connect', 0], ['skip_connect', 1], ['skip_connect', 0], ['skip_connect', 2]]


@pytest.mark.parametrize('content, reason', [
    ('', 'holds no genotype'),
    ('{"normal": [', 'holds no genotype'),
    ('[1, 2]', 'fields have to be'),
    (json.dumps({'normal': EDGES}), 'fields have to be'),
    (json.dumps(fields(extra=1)), 'fields have to be'),
    (json.dumps(fields(normal=EDGES[:3])), 'list of edges'),
    (json.dumps(fields(normal=[])), 'list of edges'),
    (json.dumps(fields(normal='skip_connect')), 'list of edges'),
    (json.dumps(fields(normal=[['none', 0], ['skip_connect', 1]])), 'edge 0'),
    (json.dumps(fields(normal=[['conv_9x9', 0], ['skip_connect', 1]])), 'edge 0'),
    (json.dumps(fields(normal=[[['sep_conv_3x3'], 0], ['skip_connect', 1]])), 'edge 0'),
    (json.dumps(fields(normal=[['skip_connect', 0], ['skip_connect', 2]])), 'state 2 is not among the 2 states'),
    (json.dumps(fields(normal=[['skip_connect', -1], ['skip_connect', 1]])), 'state -1'),
    (json.dumps(fields(normal=[['skip_connect', True], ['skip_connect', 1]])), 'state True'),
    (json.dumps(fields(normal=[['skip_connect', 0.0], ['skip_connect', 1]])), 'state 0.0'),
    (json.dumps(fields(normal_concat=[2, 3, 4, 6])), 'normal_concat'),
    (json.dumps(fields(normal_concat=[1, 2])), 'normal_concat'),
    (json.dumps(fields(reduce_concat=[2, 2])), 'reduce_concat'),
    (json.dumps(fields(reduce_concat=[])), 'reduce_concat'),
    (json.dumps(fields(reduce_concat={'2': 3})), 'reduce_concat'),
    ('[' * 100000, 'holds no genotype'),
    ('__import__("os").system("true")', 'holds no genotype'),
    ('\x00\xff', 'holds no genotype'),
])
def test_invalid_genotypes_are_refused(tmp_path, content, reason):
    path = tmp_path / 'genotype.json'
    path.write_text(content, encoding='latin1')
    with pytest.raises(UserError, match=reason):
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


def test_with_ties_the_lower_index_wins():
    genotype = genotypes.derive(np.zeros((14, 8)), np.full((14, 8), 7.0))
    assert genotype.normal == genotype.reduce == (('max_pool_3x3', 0), ('max_pool_3x3', 1)) * 4


def test_none_is_never_chosen_but_weakens_its_edge():
    table = alphas((2, 'none', 9.0), (2, 'sep_conv_3x3', 3.0),       # strong without its dominant none
                   (3, 'sep_conv_5x5', 0.2), (4, 'dil_conv_3x3', 0.1))
    genotype = genotypes.derive(table, np.full((14, 8), -1.0) + alphas(*[(e, 'none', 50.0) for e in range(14)]))
    assert genotype.normal[2:4] == (('sep_conv_5x5', 1), ('dil_conv_3x3', 2))
    assert genotype.reduce == (('max_pool_3x3', 0), ('max_pool_3x3', 1)) * 4


def test_softmax_of_large_alpha_is_finite():
    assert np.allclose(genotypes.softmax(np.array([[1000.0, 1000.0, -1000.0]])), [[0.5, 0.5, 0.0]])
