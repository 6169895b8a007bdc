"""The updates of alpha and of the weights, against numeric differentiation and against formulas in numpy."""
import functools

import numpy as np
import pytest

import architect as architect_module
from architect import Architect
from engine import custom_ops
from engine.optimizers import MomentumSGD
from genotypes import DARTS_SPACE, SearchSpace
from model_search import Supernet
from operator_sets import on_both_operator_sets
from reference import supernet as reference

XI, MU, LAMBDA, CLIP = 0.2, 0.9, 3e-2, 5.0


@functools.cache
def shared_supernet(compiled, dtype, space, partial):
    return Supernet(2, classes=5, layers=3, dtype=dtype, image_size=8, space=space, partial_channels=partial)


@pytest.fixture
def make(operators):
    """Returns a function of (rng, …) -> supernet, optimizer and architect, in the state in which a new run has them.

    Weights are the initial ones; alpha and velocity are random.
    """
    def make(rng, unrolled=True, dtype='float64', grad_clip=CLIP, space=DARTS_SPACE, partial=1):
        supernet = shared_supernet(custom_ops.enabled(), dtype, space, partial)
        store = supernet.store
        store.set('theta', supernet.layout.initial(np.random.default_rng(0), dtype))
        supernet.set_alphas({name: rng.normal(0, 0.5, array.shape) for name, array in supernet.alphas().items()})
        optimizer = MomentumSGD(store, MU, LAMBDA, grad_clip)
        store.set('velocity', rng.normal(0, 0.3, supernet.size))
        return supernet, optimizer, Architect(supernet, optimizer, unrolled=unrolled)
    return make


def batch(rng, size=6):
    return rng.normal(size=(size, 3, 8, 8)), rng.integers(0, 5, (size, 1))


def flat(alpha_gradients):
    """Returns gradients by name as one vector, in the order of the vector `alphas`."""
    return np.concatenate([gradient.reshape(-1) for gradient in alpha_gradients.values()])


# ---------------------------------------------------------------------------------------------------
# The second order, by numeric differentiation

class UnrolledLoss:
    """alpha -> L_val(w - xi (mu v + grad_w L_train(w, alpha) + lambda w), alpha), with the virtual step in numpy."""

    def __init__(self, supernet, train, valid):
        self.supernet, self.train, self.valid = supernet, supernet.feed(*train), valid
        self.w, self.v = supernet.store.get('theta'), supernet.store.get('velocity')

    def __call__(self, alphas):
        store = self.supernet.store
        store.set('alphas', alphas)
        self.supernet.run(self.train)
        store.set('theta', self.virtual_weights(store.get('gradient')))
        loss = self.supernet.evaluate(*self.valid).loss
        store.set('theta', self.w)
        return loss

    def virtual_weights(self, g):
        return self.w - XI * (MU * self.v + g + LAMBDA * self.w)

    def derivative(self, alphas, direction, step=1e-7):
        """Returns the directional derivative at alphas, by central differences of fourth order.

        The step is small because grad_w jumps wherever a ReLU or a max pooling changes sides.
        """
        at = [self(alphas + k * step * direction) for k in (-2, -1, 1, 2)]
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)


# Single entries of alpha in addition to random directions. Paddle's operators take ten times as long.
@pytest.mark.parametrize('operators, random_directions, entries, partial', [
    pytest.param(False, 1, 1, 1, id='paddle_ops'), pytest.param(True, 2, 4, 1, id='custom_ops'),
    pytest.param(False, 2, 4, 1, id='paddle_ops-all', marks=pytest.mark.slow),
    pytest.param(True, 2, 4, 2, id='custom_ops-partial_channels'),
    pytest.param(False, 2, 1, 2, id='paddle_ops-partial_channels', marks=pytest.mark.slow)], indirect=['operators'])
def test_second_order_gradient_is_the_derivative_of_the_unrolled_loss(make, monkeypatch, random_directions, entries,
                                                                      partial):
    monkeypatch.setattr(architect_module, 'PERTURBATION', 1e-5)      # as small as the step of the numeric derivative
    rng = np.random.default_rng(3)
    supernet, optimizer, second = make(rng, partial=partial)
    train, valid = batch(rng), batch(rng)
    store, alphas = supernet.store, supernet.store.get('alphas')
    directions = [rng.normal(size=alphas.shape) for _ in range(random_directions)]
    for _ in range(entries):
        directions.append(np.zeros(alphas.shape))
        directions[-1][tuple(rng.integers(alphas.shape))] = 1.0
    unrolled = UnrolledLoss(supernet, train, valid)
    expected = np.array([unrolled.derivative(alphas, direction) for direction in directions])

    def along_directions(gradient):
        return np.array([np.sum(gradient * direction) for direction in directions])

    def found(architect):
        store.set('alphas', alphas)
        architect.step(train, valid, lr=XI)
        store.set('alphas', alphas)
        return along_directions(flat(architect.alpha_gradients()))

    second_order = found(second)
    error = np.abs(second_order - expected).max()
    assert error < 1e-6 * np.abs(expected).max()
    first_order = found(Architect(supernet, optimizer, unrolled=False))
    assert np.abs(first_order - expected).max() > 1000 * error

    # The term -xi h alone: the gradient at w' is subtracted from both sides, so that it cannot hide an error in h.
    supernet.run(unrolled.train)
    store.set('theta', unrolled.virtual_weights(store.get('gradient')))
    outer = along_directions(flat(supernet.gradients(*valid).alphas))
    store.set('theta', unrolled.w)
    assert np.abs(second_order - expected).max() < 1e-5 * np.abs(expected - outer).max()


# ---------------------------------------------------------------------------------------------------
# The steps in numpy

@on_both_operator_sets('space, partial', {
    'darts': (DARTS_SPACE, 1), 'partial_channels': (DARTS_SPACE, 2),
    '3_nodes': (SearchSpace(('sep_conv_3x3', 'max_pool_3x3', 'skip_connect'), 3), 1)}, slow=['partial_channels'])
def test_the_steps_of_the_paper_on_the_reference_network(make, space, partial):
    """Steps 1 to 6 for weights by name, with the r of the paper."""
    rng = np.random.default_rng(6)
    supernet, _, architect = make(rng, space=space, partial=partial)
    train, valid = batch(rng), batch(rng)
    w, alphas, v = supernet.weights(), supernet.alphas(), supernet.layout.named(supernet.store.get('velocity'))

    def gradients(weights, images):
        return reference.gradients(weights, alphas, *images, channels=2, layers=3, primitives=space.primitives,
                                   nodes=space.nodes, partial=partial)[2:]

    g, _ = gradients(w, train)
    u, outer = gradients({n: w[n] - XI * (MU * v[n] + g[n] + LAMBDA * w[n]) for n in w}, valid)
    eps = 0.01 / np.sqrt(sum((array ** 2).sum() for array in u.values()))
    _, plus = gradients({n: w[n] + eps * u[n] for n in w}, train)
    _, minus = gradients({n: w[n] - eps * u[n] for n in w}, train)
    architect.step(train, valid, lr=XI)
    for name, gradient in architect.alpha_gradients().items():
        expected = outer[name] - XI * (plus[name] - minus[name]) / (2 * eps)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('unrolled', [True, False])
def test_weights_and_velocity_are_bit_identical_after_steps_of_alpha(make, unrolled, dtype):
    rng = np.random.default_rng(0)
    supernet, _, architect = make(rng, unrolled, dtype)
    before = {name: supernet.store.get(name) for name in ('theta', 'velocity', 'alphas')}
    for _ in range(3):
        architect.step(batch(rng), batch(rng), lr=XI)
    assert supernet.store.get('theta').tobytes() == before['theta'].tobytes()
    assert supernet.store.get('velocity').tobytes() == before['velocity'].tobytes()
    assert not np.array_equal(supernet.store.get('alphas'), before['alphas'])


@pytest.mark.parametrize('unrolled', [True, False])
def test_alpha_takes_an_adam_step_with_l2_decay(make, unrolled):
    rng = np.random.default_rng(1)
    supernet, _, architect = make(rng, unrolled)
    alpha = supernet.store.get('alphas')
    m, s = np.zeros_like(alpha), np.zeros_like(alpha)
    for t in range(1, 4):
        architect.step(batch(rng), batch(rng), lr=XI)
        gradient = flat(architect.alpha_gradients()) + 1e-3 * alpha
        m, s = 0.5 * m + 0.5 * gradient, 0.999 * s + 0.001 * gradient ** 2
        alpha = alpha - 3e-4 * (m / (1 - 0.5 ** t)) / (np.sqrt(s / (1 - 0.999 ** t)) + 1e-8)
        np.testing.assert_allclose(supernet.store.get('alphas'), alpha, rtol=0, atol=1e-13)


def test_first_order_is_the_gradient_at_the_current_weights(make):
    rng = np.random.default_rng(2)
    supernet, _, architect = make(rng, unrolled=False)
    train, valid = batch(rng), batch(rng)
    expected = supernet.gradients(*valid).alphas
    architect.step(train, valid, lr=XI)
    for name, gradient in architect.alpha_gradients().items():
        np.testing.assert_array_equal(gradient, expected[name])


# ---------------------------------------------------------------------------------------------------
# The weights

@pytest.mark.parametrize('clip', [0.5, 1000.0])
def test_weight_step_clips_then_decays_then_adds_momentum(make, clip):
    rng = np.random.default_rng(4)
    supernet, optimizer, _ = make(rng, grad_clip=clip)
    w = supernet.weights()
    v = supernet.layout.named(supernet.store.get('velocity'))
    for _ in range(3):
        g = supernet.gradients(*batch(rng)).weights
        norm = np.sqrt(sum((array ** 2).sum() for array in g.values()))
        assert (norm > clip) == (clip == 0.5)
        optimizer.step(XI)
        for name in w:
            v[name] = MU * v[name] + g[name] * min(1.0, clip / norm) + LAMBDA * w[name]
            w[name] = w[name] - XI * v[name]
        for name, array in supernet.weights().items():
            np.testing.assert_allclose(array, w[name], rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize('operators', [False], ids=['paddle_ops'], indirect=True)       # no compiled operator is used
def test_virtual_step_and_weight_step_are_one_rule(make, operators):
    """Without clipping, both move float32 weights to bit-identical values: neither can be changed alone."""
    rng = np.random.default_rng(7)
    supernet, optimizer, architect = make(rng, dtype='float32', grad_clip=1e30)
    store = supernet.store
    w, g = rng.normal(size=supernet.size), rng.normal(size=supernet.size)
    results = []
    supernet.store.set_number('lr', XI)
    for step in (architect._virtual_step, lambda: optimizer.step(XI)):
        store.set('theta', w)
        store.set('gradient', g)
        step()
        results.append(store.get('theta'))
    assert results[0].tobytes() == results[1].tobytes()
    assert not np.array_equal(results[0], w.astype('float32'))


def test_state_of_a_search_is_complete(make):
    """After steps as train_search.py takes them, the saved state has all vectors that the next step depends on."""
    rng = np.random.default_rng(8)
    supernet, optimizer, architect = make(rng, dtype='float32')

    def step(train, valid):
        architect.update(supernet.feed(*train), supernet.feed(*valid), lr=XI)
        supernet.run(supernet.feed(*train))
        optimizer.step(XI)

    step(batch(rng), batch(rng))
    state, batches = supernet.store.state(), (batch(rng), batch(rng))
    assert set(state) == {'theta', 'velocity', 'alphas', 'adam_mean', 'adam_variance', 'adam_steps'}
    step(*batches)
    expected = supernet.store.state()
    for name in supernet.store.names:                    # what is not saved may hold any value after a resume
        if not name.startswith('permutation_'):          # constants
            supernet.store.set(name, np.full_like(supernet.store.get(name), 0.5))
    supernet.store.load_state(state)
    step(*batches)
    for name, array in supernet.store.state().items():
        assert array.tobytes() == expected[name].tobytes(), name
