"""The store of vectors, and what the construction of a program asks of Paddle beyond its public functions."""
import sys

import numpy as np
import paddle
import pytest

from engine.programs import StaticProgram, VariableStore
from model_search import Supernet
from utils import in_pir_mode


def test_state_holds_saved_vectors_and_host_state_and_is_restored():
    rng = np.random.default_rng(0)
    saved, unsaved = rng.normal(size=(2, 3)), rng.normal(size=4)
    store = VariableStore(paddle.CPUPlace(), 'float64')
    store.set('saved', saved, saved=True)
    store.set('unsaved', unsaved)
    store.host_state.update(steps=3, rate=0.1)
    state = store.state()
    assert set(state) == {'saved', 'steps', 'rate'}

    store.set('saved', np.zeros((2, 3)))                      # a vector stays saved when it is set again
    store.set('unsaved', np.zeros(4))
    store.host_state.update(steps=7, rate=0.7)
    assert set(store.state()) == set(state) and state['saved'].tobytes() == saved.tobytes()        # `state` is a copy
    store.load_state(state)
    assert store.get('saved').tobytes() == saved.tobytes()
    assert store.host_state == {'steps': 3, 'rate': 0.1} and type(store.host_state['steps']) is int
    assert not store.get('unsaved').any()


@pytest.mark.parametrize('limit', [None, 100])
def test_call_stacks_are_short_during_the_construction_only(monkeypatch, limit):
    monkeypatch.delattr(sys, 'tracebacklimit', raising=False)
    if limit:
        monkeypatch.setattr(sys, 'tracebacklimit', limit, raising=False)
    store, limits = VariableStore(paddle.CPUPlace()), []

    def build():
        limits.append(sys.tracebacklimit)
        return [store.input('x', [2]) + 1.0]

    def fail():
        raise ArithmeticError
    *_, operator = StaticProgram(store, build).program.global_block().ops
    recorded = operator.attrs()['op_callstack'] if in_pir_mode() else operator.attr('op_callstack')
    assert any('in build' in line for line in recorded) and len(recorded) <= 2 * 8      # two lines per call
    with pytest.raises(ArithmeticError):
        StaticProgram(store, fail)
    assert limits == [8] and getattr(sys, 'tracebacklimit', None) == limit


@pytest.mark.skipif(paddle.__version__.startswith('2.'), reason="programs of Paddle 2 are not simplified")
@pytest.mark.slow
def test_programs_are_not_simplified_where_paddle_lacks_a_function(monkeypatch):
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(4, 3, 8, 8)), rng.integers(0, 5, 4)
    simplified = Supernet(2, 5, 3, 'float64', image_size=8)
    monkeypatch.delattr(paddle.base.libpaddle.pir, 'apply_cse_pass')
    unsimplified = Supernet(2, 5, 3, 'float64', image_size=8)
    assert unsimplified.store.operators > simplified.store.operators
    expected, result = simplified.gradients(*batch), unsimplified.gradients(*batch)
    assert result[:3] == expected[:3]
    for name, gradient in expected.weights.items():
        assert result.weights[name].tobytes() == gradient.tobytes(), name
