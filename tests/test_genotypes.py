"""Published genotypes, reading and writing, derivation from alpha."""
import json
import re

import numpy as np
import pytest

import genotypes
from genotypes import DARTS_SPACE, SearchSpace
from utils import UserError

pytestmark = pytest.mark.paddle_free


def test_published_genotypes_are_found_by_name_and_read_back(tmp_path):
    assert set(genotypes.named()) == {'NASNet', 'AmoebaNet', 'DARTS_V1', 'DARTS_V2', 'DARTS', 'DARTS_PADDLE',
                                        'PC_DARTS_CIFAR', 'PC_DARTS_IMAGENET', 'FASHION_MNIST'}
    path = tmp_path / 'genotype.json'
    for name, genotype in genotypes.named().items():
        path.write_text(genotypes.dumps(genotype))
        assert genotypes.load(name) == genotype == genotypes.load(str(path))
    assert genotypes.load('DARTS') == genotypes.load('DARTS_V2')
    nasnet = genotypes.load('NASNet')
    assert len(nasnet.normal) == len(nasnet.reduce) == 10
    assert (nasnet.normal_concat, nasnet.reduce_concat) == ((2, 3, 4, 5, 6), (4, 5, 6))
    paddle = genotypes.load('DARTS_PADDLE')
    assert paddle.normal[:2] == (('dil_conv_3x3', 0), ('sep_conv_3x3', 1))
    assert paddle.reduce[5] == ('dil_conv_5x5', 3) and paddle.reduce_concat == (2, 3, 4, 5)


EDGES = [['skip_connect', 0], ['skip_connect', 1], ['skip_connect', 0], ['skip_connect', 2]]


@pytest.mark.parametrize('reason, field, values', [
    ('list of edges', 'normal', [[], EDGES[:3], 'skip_connect', None]),
    ('edge 0', 'normal', [[[name, 0], EDGES[1]] for name in ('', ['sep_conv_3x3'], 3)]),
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


FLAT = ("Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
        "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], "
        "normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
        "('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], "
        "reduce_concat=range(2, 6))")                           # as the authors' code logs DARTS_V1
NESTED = """Genotype(
    normal=[[('sep_conv_3x3', 1), ('sep_conv_3x3', 0)], [('skip_connect', 0), ('sep_conv_3x3', 1)],
            [('skip_connect', 0), ('sep_conv_3x3', 1)], [('sep_conv_3x3', 0), ('skip_connect', 2)]],
    normal_concat=[2, 3, 4, 5],
    reduce=[[('max_pool_3x3', 0), ('max_pool_3x3', 1)], [('skip_connect', 2), ('max_pool_3x3', 0)],
            [('max_pool_3x3', 0), ('skip_connect', 2)], [('skip_connect', 2), ('avg_pool_3x3', 0)]],
    reduce_concat=list(range(2, 6)))  # nested per node
"""
FORMS = {
    'flat': FLAT, 'nested': NESTED, 'of this project': f'genotype = {genotypes.DARTS_V1}',
    'a line of a log': f'2026-01-01 12:00:00,000 INFO epoch (3) genotype = {FLAT}\n2026-01-01 next line (x',
    'several times': f'{FLAT}\n{NESTED}', 'numpy': FLAT.replace("0)", "np.int64(0))"),
    'module': f"from collections import namedtuple\nGenotype = namedtuple('Genotype', 'normal normal_concat')\n"
              f"MINE = genotypes.{NESTED}",
    'positional': re.sub('[a-z_]+=', '', NESTED),
    'json': genotypes.dumps(genotypes.DARTS_V1), 'json, nested': json.dumps(
        {**genotypes.DARTS_V1._asdict(), 'normal': [genotypes.DARTS_V1.normal[k:k + 2] for k in range(0, 8, 2)]})}


@pytest.mark.parametrize('form', FORMS)
def test_a_genotype_is_read_in_every_form_that_people_paste(tmp_path, form):
    text = FORMS[form]
    assert genotypes.load(text) == genotypes.DARTS_V1
    for name, content in (('x.txt', text.encode()), ('x.py', b'\xef\xbb\xbf' + text.encode()),
                          ('a (b) {c}.json', text.encode())):
        (tmp_path / name).write_bytes(content)
        assert genotypes.load(str(tmp_path / name), DARTS_SPACE.primitives) == genotypes.DARTS_V1


@pytest.mark.parametrize('text, reason', [
    ("Genotype(normal=__import__('os').system('touch {path}'))", 'is neither a list nor an operation nor a number'),
    ("Genotype(*[1])", 'is neither'), ("Genotype(normal=[('sep_conv_3x3', 1)]", 'parentheses are not closed'),
    (FLAT.replace('6)', '10 ** 12)'), 'is neither'), (FLAT.replace('6)', '9' * 30 + ')'), 'is neither'),
    (FLAT.replace('range(2, 6)', 'range(2, 6, 0)'), 'is neither'), (FLAT.replace("1)", "1.0)"), 'state 1.0'),
    (FLAT.replace('reduce_concat', 'normal_concat'), "field 'normal_concat' twice"),
    (FLAT + FLAT.replace('skip_connect', 'dil_conv_3x3'), '2 different genotypes'),
    (FLAT.replace('range(2, 6)', 'range(2, 7)'), 'has to name different nodes among'),
    (FLAT.replace(", ('skip_connect', 2)], normal", "], normal"), 'two for each node'),
    (NESTED.replace("1), ('sep_conv_3x3', 0)]", "1)]"), 'without exactly two'),
    ('Genotype(normal=1, normal_concat=1, reduce=1, reduce_concat=1)', 'normal has to be a list of edges'),
    ('Genotype(' + '[' * 3000 + ']' * 3000 + ')', 'holds no genotype'),
    ('Genotype(1 2)', 'not an expression of Python'),
    ('{"normal": 1}', 'its fields have to be'), ('Genotype', 'no genotype .Genotype.: give one of')])
def test_texts_that_hold_no_genotype(tmp_path, text, reason):
    path = tmp_path / 'touched'
    with pytest.raises(UserError, match=reason) as caught:
        genotypes.load(text.replace('{path}', str(path)))
    assert '\n' not in str(caught.value) and not path.exists()


def test_a_genotype_that_is_pasted_into_the_file_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(genotypes, 'MINE', eval(NESTED, vars(genotypes).copy()), raising=False)
    assert genotypes.load('MINE') == genotypes.DARTS_V1 and 'MINE' in genotypes.named()
    monkeypatch.setattr(genotypes, 'MINE', genotypes.MINE._replace(normal_concat=range(2, 9)))
    with pytest.raises(UserError, match='MINE holds no genotype: normal_concat range'):
        genotypes.load('MINE')
    assert genotypes.load('DARTS_V1') == genotypes.DARTS_V1                 # the others can be used


@pytest.mark.parametrize('content', ['[1, 2]', json.dumps({'normal': EDGES}), '[' * 100000, '\x00\xff', ''])
def test_invalid_files_are_refused(tmp_path, content):
    path = tmp_path / 'genotype.json'
    path.write_text(content, encoding='latin1')
    with pytest.raises(UserError, match='holds no genotype|is not a text in UTF-8'):
        genotypes.load(str(path))


def test_unknown_operations_are_refused_where_the_known_ones_are_given(tmp_path):
    path = tmp_path / 'genotype.json'
    path.write_text(genotypes.dumps(genotypes.DARTS_V2).replace('dil_conv_3x3', 'conv_9x9'))
    assert genotypes.load(str(path)).normal[-1] == ('conv_9x9', 2)
    with pytest.raises(UserError, match=r"genotype.json .*edge 7, \['conv_9x9', 2\], .*\(sep_conv_3x3, skip_connect"):
        genotypes.load(str(path), ('sep_conv_3x3', 'skip_connect', 'max_pool_3x3'))


def test_edges_of_none_and_other_numbers_of_nodes_are_accepted():
    for nodes in (1, 3, 5):
        cell, concat = (('none', 0), ('skip_connect', 1)) * nodes, tuple(range(2, 2 + nodes))
        fields = {'normal': cell, 'normal_concat': concat, 'reduce': cell, 'reduce_concat': concat}
        assert genotypes.check(fields)._asdict() == fields


# ---------------------------------------------------------------------------------------------------
# Search spaces

@pytest.mark.parametrize('nodes, edges, first_edges, groups', [
    (1, 2, (0,), ((0, 1),)), (3, 9, (0, 2, 5), ((0, 1), (2,), (3,))),
    (4, 14, (0, 2, 5, 9), ((0, 1), (2,), (3,), (4,))), (5, 20, (0, 2, 5, 9, 14), ((0, 1), (2,), (3,), (4,), (5,)))])
def test_edges_follow_from_the_nodes(nodes, edges, first_edges, groups):
    space = SearchSpace(['skip_connect', 'sep_conv_3x3'], nodes)
    assert (space.edges, space.first_edges, space.state_groups) == (edges, first_edges, groups)
    assert len(space.edge_names) == edges
    assert space.edge_names[-1] == f'{nodes} to {1 + nodes}'
    assert SearchSpace.of(json.loads(json.dumps(space.as_dict()))) == space
    assert str(space) == f'{nodes} nodes, skip_connect,sep_conv_3x3'


def test_the_space_of_the_paper():
    assert (len(DARTS_SPACE.primitives), DARTS_SPACE.nodes, DARTS_SPACE.edges) == (8, 4, 14)
    assert SearchSpace(DARTS_SPACE.primitives) == DARTS_SPACE != SearchSpace(DARTS_SPACE.primitives[::-1])


@pytest.mark.parametrize('primitives, nodes, reason', [
    ((), 4, 'at least one operation other than none'), (('none',), 4, 'at least one operation other than none'),
    (('none', 'skip_connect', 'none'), 4, 'none,skip_connect,none: none occurs more than once'),
    (('skip_connect', 3), 4, 'has to be the name'), (('skip_connect', ''), 4, 'has to be the name'),
    (('skip_connect',), 0, 'nodes is 0'), (('skip_connect',), 2.0, 'nodes is 2.0'), (('skip_connect',), True, 'nodes')])
def test_invalid_spaces_are_refused(primitives, nodes, reason):
    with pytest.raises(UserError, match=reason):
        SearchSpace(primitives, nodes)


def test_a_file_of_another_space_is_refused_with_both():
    space = SearchSpace(('skip_connect', 'sep_conv_3x3'), 3)
    recorded = genotypes.recorded_space('a.npz', {'space': space.as_dict()})
    space.check_recorded('a.npz', recorded)
    DARTS_SPACE.check_recorded('a.npz', genotypes.recorded_space('a.npz', {}))
    with pytest.raises(UserError, match='a.npz .*: 3 nodes, skip_connect,sep_conv_3x3 there, 4 nodes, none,max_pool'):
        DARTS_SPACE.check_recorded('a.npz', recorded)
    for fields in ({'primitives': ['none'], 'nodes': 4}, {'nodes': 4}, None, 'none', {**space.as_dict(), 'edges': 9}):
        with pytest.raises(UserError, match='a.npz: it records no search space'):
            genotypes.recorded_space('a.npz', {'space': fields})


# ---------------------------------------------------------------------------------------------------
# Derivation

def mixing_weights(*strengths, space=DARTS_SPACE):
    """Returns the softmax of alpha [edges, primitives]: zero except for the given (edge, operation, value)."""
    table = np.zeros((space.edges, len(space.primitives)))
    for edge, operation, value in strengths:
        table[edge, space.primitives.index(operation)] = value
    weights = np.exp(table - table.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_each_node_keeps_its_two_strongest_edges_the_stronger_first():
    table = mixing_weights(
        (0, 'sep_conv_3x3', 1.0), (1, 'dil_conv_5x5', 2.0),                                # node 2: states 0, 1
        (2, 'max_pool_3x3', 3.0), (3, 'avg_pool_3x3', 1.0), (4, 'skip_connect', 2.0),      # node 3: 0, 1, 2
        (5, 'sep_conv_5x5', 0.1), (6, 'sep_conv_5x5', 0.2), (7, 'sep_conv_5x5', 0.3), (8, 'dil_conv_3x3', 0.4),
        (9, 'sep_conv_3x3', 0.5), (13, 'skip_connect', 0.6), (13, 'max_pool_3x3', 0.59))    # node 5: 0 to 4
    cell = (('dil_conv_5x5', 1), ('sep_conv_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2),
            ('dil_conv_3x3', 3), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('skip_connect', 4))
    genotype = genotypes.derive(DARTS_SPACE, table, mixing_weights((0, 'skip_connect', 1.0)))
    # The second operation on edge 13 takes weight from its first, so the weaker alpha of edge 9 wins.
    assert genotype.normal == cell
    assert genotype.reduce[:2] == (('skip_connect', 0), ('max_pool_3x3', 1))
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


def test_none_is_never_chosen_but_weakens_its_edge_and_with_ties_the_lower_index_wins():
    table = mixing_weights((2, 'none', 9.0), (2, 'sep_conv_3x3', 3.0),       # strong without its dominant none
                   (3, 'sep_conv_5x5', 0.2), (4, 'dil_conv_3x3', 0.1))
    genotype = genotypes.derive(DARTS_SPACE, table, mixing_weights(*[(edge, 'none', 9.0) for edge in range(14)]))
    assert genotype.normal[2:4] == (('sep_conv_5x5', 1), ('dil_conv_3x3', 2))
    assert genotype.reduce == (('max_pool_3x3', 0), ('max_pool_3x3', 1)) * 4


@pytest.mark.parametrize('primitives', [('sep_conv_3x3', 'none', 'skip_connect'),
                                        ('skip_connect', 'sep_conv_3x3', 'none'), ('skip_connect', 'sep_conv_3x3')])
def test_none_is_excluded_by_its_name_wherever_it_stands(primitives):
    space = SearchSpace(primitives, nodes=2)
    strengths = [(0, 'skip_connect', 1.0), (1, 'sep_conv_3x3', 2.0),                   # node 2: states 0, 1
                 (2, 'sep_conv_3x3', 3.0), (3, 'skip_connect', 2.0), (4, 'sep_conv_3x3', 1.0)]
    strengths += [(edge, 'none', 0.5) for edge in range(5)] if 'none' in primitives else []
    reduce = [(0, 'skip_connect', 0.4), (2, 'sep_conv_3x3', 0.5), (4, 'skip_connect', 0.7)]
    genotype = genotypes.derive(space, mixing_weights(*strengths, space=space), mixing_weights(*reduce, space=space))
    assert genotype.normal == (('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('skip_connect', 1))
    first = next(name for name in primitives if name != 'none')                        # edge 1 is undecided
    assert genotype.reduce == (('skip_connect', 0), (first, 1), ('skip_connect', 2), ('sep_conv_3x3', 0))
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3)


def test_the_derivation_compares_weights_of_any_kind():
    """Weights that do not add up to 1, as those of a sigmoid."""
    space = SearchSpace(('none', 'skip_connect', 'sep_conv_3x3'), nodes=1)
    weights = np.array([[0.9, 0.6, 0.5], [0.1, 0.2, 0.8]])
    assert genotypes.derive(space, weights, weights[::-1]) == genotypes.Genotype(
        (('sep_conv_3x3', 1), ('skip_connect', 0)), (2,), (('sep_conv_3x3', 0), ('skip_connect', 1)), (2,))


# ---------------------------------------------------------------------------------------------------
# Random genotypes

def test_random_genotypes_differ_and_are_valid():
    drawn = [genotypes.draw(DARTS_SPACE, seed) for seed in range(20)]
    assert len(set(drawn)) == 20 and drawn[3] == genotypes.draw(DARTS_SPACE, 3)
    for genotype in drawn:
        genotypes.check(genotype._asdict())


def test_the_genotype_of_a_seed_stays():
    """The genotypes of the README's experiment are drawn again, so a seed has to keep its genotype."""
    def words(cell):
        return ' '.join(f'{operation} {state}' for operation, state in cell)
    genotype = genotypes.draw(DARTS_SPACE, 3)
    assert words(genotype.normal) == ('avg_pool_3x3 0 avg_pool_3x3 1 sep_conv_5x5 0 max_pool_3x3 2 '
                                      'sep_conv_5x5 0 sep_conv_3x3 1 dil_conv_3x3 0 max_pool_3x3 1')
    assert words(genotype.reduce) == ('skip_connect 0 dil_conv_5x5 1 sep_conv_5x5 1 sep_conv_5x5 2 '
                                      'dil_conv_5x5 0 dil_conv_3x3 2 sep_conv_5x5 1 sep_conv_5x5 4')


@pytest.mark.parametrize('nodes', [1, 3, 5])
def test_random_genotypes_of_another_space(nodes):
    space = genotypes.SearchSpace(('conv_1x1', 'none', 'skip_connect'), nodes)
    drawn = [genotypes.draw(space, seed) for seed in range(20)]
    operations = set()
    for genotype in drawn:
        genotypes.check(genotype._asdict(), space.primitives)
        for cell, concat in (genotype[:2], genotype[2:]):
            assert len(cell) == 2 * nodes and concat == tuple(range(2, 2 + nodes))
            assert all(cell[2 * node][1] < cell[2 * node + 1][1] for node in range(nodes))
            operations |= {operation for operation, _ in cell}
    assert operations == {'conv_1x1', 'skip_connect'}
