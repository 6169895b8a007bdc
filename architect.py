"""The update of alpha, and the curvature of the validation loss with respect to alpha.

The update is the second-order approximation of DARTS (arXiv 1806.09055, section 2.3):

    min_alpha L_val(w*(alpha), alpha)    with    w*(alpha) = argmin_w L_train(w, alpha)

One step of the weight optimizer approximates w*: w' = w - xi (mu v + grad_w L_train(w, alpha) + lambda w). Then

    d_alpha = grad_alpha L_val(w', alpha) - xi * h
    h = (grad_alpha L_train(w + eps u, alpha) - grad_alpha L_train(w - eps u, alpha)) / (2 eps)

with u = grad_w' L_val(w', alpha) and eps = 0.01 / ||u||: h is the product of u and the mixed second derivative of
L_train, by central differences. Each gradient is a run of the one supernet program; the programs built here are the
vector arithmetic in between, on the device. With several ranks each run sees a shard of the batch and the gradients
are averaged.

The curvature is the dominant eigenvalue of the Hessian H = grad_alpha^2 L_val(w, alpha) at the current w and alpha. It
rises before a search collapses to skip connections (RobustDARTS, arXiv 1909.09656). The Lanczos method takes it from
products of H with a few vectors d, ||d|| = 1:

    H d = (grad_alpha L_val(w, alpha + delta d) - grad_alpha L_val(w, alpha - delta d)) / (2 delta)
"""
from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import numpy as np

import engine  # noqa: F401  before paddle
import paddle

from engine.distributed import average_gradients
from engine.optimizers import Adam, MomentumSGD, global_norm
from engine.programs import StaticProgram
from model_search import Supernet

PERTURBATION = 0.01              # r in eps = r / ||u||

# delta of the curvature. It is large because L_val is smooth only in pieces: its gradient jumps where a ReLU or a max
# pooling changes sides. The number of jumps between the two gradients is proportional to delta and their signs are
# mixed, so they add noise of about delta^-1/2 to H d. (Rounding to float32 matters less: 1e-7 of the gradient.) But the
# larger delta, the longer the segment over which the difference averages H. For C 16, 8 cells, after 3 steps with 16
# images the eigenvalue is 0.173 where nothing jumps (float64, delta 1e-10). In float32 a delta of 0.03, 0.1, 0.3, 0.5
# and 1 gives 0.485, 0.263, 0.156, 0.137 and 0.114. Smaller networks and batches, with more noise, need at least 0.5.
DELTA = 0.5

Curvature = namedtuple('Curvature', 'value products change')
CURVATURE_LIMIT = 40             # on the number of products; about 10 are needed


def dominant_eigenvalue(product: Callable[[np.ndarray], np.ndarray], size: int, tolerance: float,
                        limit: int) -> Curvature:
    """Returns the eigenvalue of largest absolute value of a symmetric matrix H [size, size], with its sign.

    product: d [size] -> H d, for ||d|| = 1. The Lanczos method with full re-orthogonalisation, from a fixed
    pseudo-random vector, ends when a product changes the eigenvalue by at most `tolerance`, relative to it, and after
    `limit` products. Returns (eigenvalue, number of products, relative change by the last one). The eigenvalue is NaN
    when a product has a number that is not finite.
    """
    basis, products = np.empty((2, 0, size))                     # rows d and H d
    vector, value = np.random.default_rng(0).normal(size=size), np.inf
    for count in range(1, min(limit, size) + 1):
        basis = np.vstack([basis, vector / np.linalg.norm(vector)])
        products = np.vstack([products, product(basis[-1])])
        if not np.isfinite(products[-1]).all():
            return Curvature(np.nan, count, np.nan)
        projected = basis @ products.T                           # symmetric up to the errors of the differences
        before, value = value, max(np.linalg.eigvalsh((projected + projected.T) / 2), key=abs)
        vector = products[-1]
        for _ in range(2):                                       # twice, as once leaves rounding errors
            vector = vector - basis.T @ (basis @ vector)
        change = abs(value - before) / max(abs(value), 1e-300)
        if change <= tolerance or np.linalg.norm(vector) <= 1e-10 * np.linalg.norm(products[-1]):
            break                                                # converged, or the vectors span an invariant subspace
    return Curvature(float(value), count, float(change))


class Architect:
    """Updates alpha of a supernet by Adam on the first- or second-order gradient.

    optimizer: the MomentumSGD that trains the weights of the supernet; the virtual step takes its rule and velocity.
    None creates one with the defaults of the search.
    arch_learning_rate, arch_weight_decay: Adam's learning rate, and the L2 decay that is added to the gradient.
    unrolled: True for the second order, False for grad_alpha L_val(w, alpha) at the current weights.
    """

    def __init__(self, supernet: Supernet, optimizer: MomentumSGD | None = None, arch_learning_rate: float = 3e-4,
                 arch_weight_decay: float = 1e-3, unrolled: bool = True):
        self.supernet, self.store, self.unrolled = supernet, supernet.store, unrolled
        self.optimizer = optimizer or MomentumSGD(self.store, momentum=0.9, weight_decay=3e-4, grad_clip=5.0)
        self.gradient_name = 'd_alpha' if unrolled else 'alpha_gradient'
        if unrolled:
            for name in ('w', 'u'):
                self.store.set(name, np.zeros_like(self.store.get('theta')))
            for name in ('d_alpha', 'validation_gradient', 'plus_gradient'):
                self.store.set(name, np.zeros_like(self.store.get('alphas')))
            self.store.set('eps', np.zeros(1))
            self._virtual_step = StaticProgram(self.store, self._build_virtual_step)
            self._plus = StaticProgram(self.store, self._build_plus)
            self._minus = StaticProgram(self.store, self._build_minus)
            self._second_order = StaticProgram(self.store, self._build_second_order)
        self.adam = Adam(self.store, 'alphas', self.gradient_name, arch_learning_rate, arch_weight_decay, beta1=0.5)

    def step(self, train: tuple, valid: tuple, lr: float) -> None:
        """Updates alpha once; train, valid: (images, labels); lr: xi, the learning rate of the weights.

        Weights and velocity are bit-identical afterwards.
        """
        self.update(self.supernet.feed(*train), self.supernet.feed(*valid), lr)

    def update(self, train: dict, valid: dict, lr: float) -> None:
        """Like `step`, with batches from `Supernet.feed`."""
        run, run_alphas = self.supernet.compute_gradients, self.supernet.compute_alpha_gradient
        self.store.set_number('lr', lr)
        if self.unrolled:
            run(train)                   # 1  g = grad_w L_train(w, alpha)
            average_gradients(self.store, 'gradient')
            self._virtual_step()         # 2  w' = w - xi (mu v + g + lambda w)
            run(valid)                   # 3  grad_alpha L_val(w', alpha),  u = grad_w' L_val(w', alpha)
            average_gradients(self.store, 'gradient')
            self._plus()                 # 4  eps = r / ||u||,  w + eps u
            run_alphas(train)            #    grad_alpha L_train(w + eps u, alpha)
            self._minus()                #    w - eps u
            run_alphas(train)            #    grad_alpha L_train(w - eps u, alpha)
            self._second_order()         # 5, 6  d_alpha; restores w
        else:
            run_alphas(valid)            # d_alpha = grad_alpha L_val(w, alpha)
        average_gradients(self.store, self.gradient_name)        # d_alpha is linear in the three gradients of alpha
        self.adam.step()

    def curvature(self, valid: dict, tolerance: float = 1e-3, limit: int = CURVATURE_LIMIT,
                  progress: Callable[[], object] = lambda: None) -> Curvature:
        """Returns the dominant eigenvalue of the Hessian of the validation loss with respect to alpha.

        valid: a batch from `Supernet.feed`; tolerance, limit: as of `dominant_eigenvalue`; progress: is called after
        each product, which takes two runs of `Supernet.compute_alpha_gradient`. Independent of the order of the update.
        Weights, alpha and the states of both optimizers are bit-identical afterwards.
        """
        alphas = self.store.get('alphas')

        def gradient(shift: np.ndarray) -> np.ndarray:
            self.store.set('alphas', alphas + shift.reshape(alphas.shape))
            self.supernet.compute_alpha_gradient(valid)
            average_gradients(self.store, 'alpha_gradient')
            return self.store.get('alpha_gradient').reshape(-1).astype('float64')

        def product(d: np.ndarray) -> np.ndarray:
            result = (gradient(DELTA * d) - gradient(-DELTA * d)) / (2 * DELTA)
            progress()
            return result

        try:
            return dominant_eigenvalue(product, alphas.size, tolerance, limit)
        finally:
            self.store.set('alphas', alphas)

    def alpha_gradients(self) -> dict[str, np.ndarray]:
        """Returns d_alpha of the last step, without weight decay: as `Supernet.alphas`."""
        return self.supernet.architecture.named(self.store.get(self.gradient_name))

    def _build_virtual_step(self) -> list:
        """Saves w, then theta <- w - xi (mu v + g + lambda w)."""
        w, v, g, xi = map(self.store.variable, ('theta', 'velocity', 'gradient', 'lr'))
        virtual, _ = self.optimizer.rule(w, v, g, xi)
        self.store.assign('w', w)
        self.store.assign('theta', virtual)
        return []

    def _build_plus(self) -> list:
        """Saves u and grad_alpha L_val(w', alpha), then theta <- w + eps u."""
        w, u = map(self.store.variable, ('w', 'gradient'))
        # If u = 0 then h = 0 for any finite eps; the maximum only avoids a division by zero.
        eps = self.store.scalar(PERTURBATION) / paddle.maximum(global_norm(u), self.store.scalar(1e-30))
        self.store.assign('validation_gradient', self.store.variable('alpha_gradient'))
        self.store.assign('u', u)
        self.store.assign('eps', eps)
        self.store.assign('theta', w + eps * u)
        return []

    def _build_minus(self) -> list:
        """Saves grad_alpha L_train(w + eps u, alpha), then theta <- w - eps u."""
        w, u, eps = map(self.store.variable, ('w', 'u', 'eps'))
        self.store.assign('plus_gradient', self.store.variable('alpha_gradient'))
        self.store.assign('theta', w - eps * u)
        return []

    def _build_second_order(self) -> list:
        """d_alpha <- grad_alpha L_val(w', alpha) - xi h, then theta <- w."""
        validation, plus, minus, eps, w, xi = map(self.store.variable, (
            'validation_gradient', 'plus_gradient', 'alpha_gradient', 'eps', 'w', 'lr'))
        h = (plus - minus) / (eps + eps)
        self.store.assign('d_alpha', validation - xi * h)
        self.store.assign('theta', w)
        return []
