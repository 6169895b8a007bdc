"""The update of alpha and of the weights, against numeric differentiation and hand-written optimizers."""
import numpy as np
import pytest

import architect as architect_module
from reference import supernet as plain
from architect import Architect
from model_search import Supernet
from engine.optimizers import MomentumSGD

XI, MU, LAMBDA, CLIP = 0.2, 0.9, 3e-2, 5.0

pytestmark = pytest.mark.usefixtures('operators')


def make(rng, unrolled=True, dtype='float64', grad_clip=CLIP):
    supernet = Supernet(channels=2, classes=5, layers=3, dtype=dtype, image_size=8)
    supernet.set_alphas({name: rng.normal(0, 0.5, (14, 8)) for name in supernet.alphas()})
    optimizer = MomentumSGD(supernet.store, MU, LAMBDA, grad_clip)
    supernet.store.set('velocity', rng.normal(0, 0.3, supernet.size))
    return supernet, optimizer, Architect(supernet, optimizer, unrolled=unrolled)


def batch(rng, size=6):
    return rng.normal(size=(size, 3, 8, 8)), rng.integers(0, 5, (size, 1))


class UnrolledLoss:
    """alpha -> L_val(w - xi (mu v + grad_w L_train(w, alpha) + lambda w), alpha), in numpy around the loss."""

    def __init__(self, supernet, train, valid):
        self.supernet, self.train, self.valid = supernet, train, valid
        self.w, self.v = supernet.store.get('theta'), supernet.store.get('velocity')

    def __call__(self, alphas):
        store = self.supernet.store
        store.set('alphas', alphas)
        self.supernet.gradients(*self.train)
        g = store.get('gradient')
        store.set('theta', self.w - XI * (MU * self.v + g + LAMBDA * self.w))
        loss = self.supernet.evaluate(*self.valid).loss
        store.set('theta', self.w)
        return loss

    def derivative(self, alphas, direction, step=1e-7):
        """The directional derivative at alphas [2, 14, 8], by central differences of fourth order.

        The step is small because grad_w jumps wherever a ReLU or a max pooling changes sides.
        """
        at = [self(alphas + k * step * direction) for k in (-2, -1, 1, 2)]
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)


@pytest.fixture(scope='module')
def numeric(operators):
    """A supernet, a batch of each kind, directions in alpha and the numeric derivatives along them."""
    rng = np.random.default_rng(3)
    supernet, optimizer, _ = make(rng)
    train, valid = batch(rng), batch(rng)
    alphas = supernet.store.get('alphas')
    unrolled = UnrolledLoss(supernet, train, valid)
    directions = [rng.normal(size=alphas.shape) for _ in range(2)]
    for _ in range(4):                                    # and single entries
        unit = np.zeros(alphas.shape)
        unit[tuple(rng.integers(alphas.shape))] = 1.0
        directions.append(unit)
    derivatives = np.array([unrolled.derivative(alphas, d) for d in directions])
    supernet.store.set('alphas', alphas)
    return supernet, optimizer, train, valid, alphas, directions, derivatives


def along(supernet, directions, architect):
    gradient = np.stack(list(architect.alpha_gradients().values()))
    return np.array([np.sum(gradient * d) for d in directions])


def test_second_order_gradient_is_the_derivative_of_the_unrolled_loss(numeric, monkeypatch):
    supernet, optimizer, train, valid, alphas, directions, derivatives = numeric
    monkeypatch.setattr(architect_module, 'PERTURBATION', 1e-5)      # like the step of the numeric derivative
    second = Architect(supernet, optimizer)
    second.step(train, valid, lr=XI)
    supernet.store.set('alphas', alphas)
    error = np.abs(along(supernet, directions, second) - derivatives).max()
    assert error < 1e-6 * np.abs(derivatives).max()

    first = Architect(supernet, optimizer, unrolled=False)
    first.step(train, valid, lr=XI)
    supernet.store.set('alphas', alphas)
    difference = np.abs(along(supernet, directions, first) - derivatives).max()
    assert difference > 1000 * error


def test_the_second_order_term_alone(numeric, monkeypatch):
    """-xi h, with the gradient at w' taken out of both sides: nothing large hides an error in it."""
    supernet, optimizer, train, valid, alphas, directions, derivatives = numeric
    monkeypatch.setattr(architect_module, 'PERTURBATION', 1e-5)
    w, v = supernet.store.get('theta'), supernet.store.get('velocity')
    g = supernet.layout.flat(supernet.gradients(*train).weights, w)
    supernet.store.set('theta', w - XI * (MU * v + g + LAMBDA * w))
    outer = np.stack(list(supernet.gradients(*valid).alphas.values()))
    supernet.store.set('theta', w)
    architect = Architect(supernet, optimizer)
    architect.step(train, valid, lr=XI)
    supernet.store.set('alphas', alphas)
    outer = np.array([np.sum(outer * d) for d in directions])
    term, expected = along(supernet, directions, architect) - outer, derivatives - outer
    assert np.abs(term - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_steps_of_the_paper_on_the_plain_network():
    """Steps 1 to 6 written out for dictionaries of weights, with the r of the paper."""
    rng = np.random.default_rng(6)
    supernet, _, architect = make(rng)
    train, valid = batch(rng), batch(rng)
    w, alphas, v = supernet.weights(), supernet.alphas(), supernet.layout.named(supernet.store.get('velocity'))

    def gradients(weights, images):
        return plain.gradients(weights, alphas, *images, channels=2, layers=3)[2:]

    g, _ = gradients(w, train)
    u, outer = gradients({n: w[n] - XI * (MU * v[n] + g[n] + LAMBDA * w[n]) for n in w}, valid)
    eps = 0.01 / np.sqrt(sum((each ** 2).sum() for each in u.values()))
    _, plus = gradients({n: w[n] + eps * u[n] for n in w}, train)
    _, minus = gradients({n: w[n] - eps * u[n] for n in w}, train)
    architect.step(train, valid, lr=XI)
    for name, gradient in architect.alpha_gradients().items():
        expected = outer[name] - XI * (plus[name] - minus[name]) / (2 * eps)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('unrolled', [True, False])
def test_weights_and_velocity_are_untouched_to_the_bit(unrolled, dtype):
    rng = np.random.default_rng(0)
    supernet, _, architect = make(rng, unrolled, dtype)
    before = {name: supernet.store.get(name) for name in ('theta', 'velocity', 'alphas')}
    for _ in range(3):
        architect.step(batch(rng), batch(rng), lr=XI)
    assert supernet.store.get('theta').tobytes() == before['theta'].tobytes()
    assert supernet.store.get('velocity').tobytes() == before['velocity'].tobytes()
    assert not np.array_equal(supernet.store.get('alphas'), before['alphas'])


@pytest.mark.parametrize('unrolled', [True, False])
def test_alpha_takes_an_adam_step_with_l2_decay(unrolled):
    rng = np.random.default_rng(1)
    supernet, _, architect = make(rng, unrolled)
    alpha = supernet.store.get('alphas')
    m, s = np.zeros_like(alpha), np.zeros_like(alpha)
    for t in range(1, 4):
        architect.step(batch(rng), batch(rng), lr=XI)
        gradient = np.stack(list(architect.alpha_gradients().values())) + 1e-3 * alpha
        m, s = 0.5 * m + 0.5 * gradient, 0.999 * s + 0.001 * gradient ** 2
        alpha = alpha - 3e-4 * (m / (1 - 0.5 ** t)) / (np.sqrt(s / (1 - 0.999 ** t)) + 1e-8)
        np.testing.assert_allclose(supernet.store.get('alphas'), alpha, rtol=0, atol=1e-13)


def test_first_order_uses_the_gradient_at_the_present_weights():
    rng = np.random.default_rng(2)
    supernet, _, architect = make(rng, unrolled=False)
    train, valid = batch(rng), batch(rng)
    expected = supernet.gradients(*valid).alphas
    architect.step(train, valid, lr=XI)
    for name, gradient in architect.alpha_gradients().items():
        np.testing.assert_array_equal(gradient, expected[name])


@pytest.mark.parametrize('clip', [0.5, 1000.0])
def test_weight_step_clips_then_decays_then_adds_momentum(clip):
    rng = np.random.default_rng(4)
    supernet, optimizer, _ = make(rng, grad_clip=clip)
    w = supernet.weights()
    v = supernet.layout.named(supernet.store.get('velocity'))
    for _ in range(3):
        g = supernet.gradients(*batch(rng)).weights
        total = np.sqrt(sum((each ** 2).sum() for each in g.values()))
        assert (total > clip) == (clip == 0.5)
        optimizer.step(XI)
        for name in w:
            clipped = g[name] * min(1.0, clip / total)
            v[name] = MU * v[name] + clipped + LAMBDA * w[name]
            w[name] = w[name] - XI * v[name]
        for name, array in supernet.weights().items():
            np.testing.assert_allclose(array, w[name], rtol=0, atol=1e-13, err_msg=name)
