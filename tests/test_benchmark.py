"""The table of the start, with a peer that answers at once (edge by edge takes a minute), and sides that differ."""
from types import SimpleNamespace

import pytest

import benchmark
import utils


class Peer:
    """In the place of a Side that builds edge by edge."""

    def __init__(self, answer):
        self.answer = answer

    def end(self):
        return 2.0


@pytest.fixture
def start(monkeypatch):
    """loss of the peer -> {what: row}, at a size that takes seconds; None: the loss of the supernet itself."""
    for name, value in (('SMALL_SIZES', ((2, 3),)), ('CHANNELS', 2), ('LAYERS', 3)):
        monkeypatch.setattr(benchmark, name, value)

    def rows(loss=None):
        answers = []

        def side(name, real=benchmark.Side, **settings):
            assert settings == {'channels': 2, 'layers': 3}
            if name == 'our_start':
                ours = real(name, **settings)
                answers.append(ours.answer)
                return ours
            assert name == 'edge_by_edge_start'
            return Peer({'seconds': 1000.0, 'operators': 6000, 'loss': loss or answers[0]['loss']})
        monkeypatch.setattr(benchmark, 'Side', side)
        return {row['what']: row for row in benchmark.start(SimpleNamespace(full=False, rounds=1))}
    return rows


def test_the_start_of_both_sides(start):
    rows = start()
    name = 'start, C 2, 3 cells'
    assert set(rows) == {f'{name}, ready', f'{name}, operators', f'{name}, peak memory', 'start at the defaults, ready'}
    for what, peer in (('ready', 1000.0), ('operators', 6000), ('peak memory', 2.0)):
        row = rows[f'{name}, {what}']
        assert row['peer'] == peer and row['ratio'] == row['ours'] / peer
    assert rows[f'{name}, operators']['ours'] > 100
    assert 0 < rows[f'{name}, ready']['ours'] < 1000 and 0.1 < rows[f'{name}, peak memory']['ours'] < 20
    assert 'peer' not in rows['start at the defaults, ready']


@pytest.mark.parametrize('loss', [2.0, float('nan')])
def test_sides_that_differ_are_not_compared(start, loss):
    with pytest.raises(utils.UserError, match='do not compute the same: loss differs'):
        start(loss)
