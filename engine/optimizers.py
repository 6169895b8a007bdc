"""Update rules on the vectors of a store: momentum SGD for the weights, Adam for the architecture parameters."""
from __future__ import annotations

import numpy as np
import paddle

from engine import custom_ops
from engine.programs import StaticProgram, VariableStore


class MomentumSGD:
    """SGD with momentum on the vectors theta and velocity of a store: the weight step of search and training.

    Each step clips `gradient` by its global norm (g <- g * min(1, grad_clip / ||g||)) and applies `rule`.
    """

    def __init__(self, store: VariableStore, momentum: float, weight_decay: float, grad_clip: float):
        self.momentum, self.weight_decay, self.grad_clip = momentum, weight_decay, grad_clip
        self.store = store
        store.set('velocity', np.zeros_like(store.get('theta')), saved=True)
        store.set_number('lr', 0.0)
        self._step = StaticProgram(store, self._build)

    def rule(self, w, v, g, lr, limit=None) -> tuple:
        """Returns (w', v'), variables of the program under construction, from weights, velocity, gradient and rate.

        limit: None, or the norm [1] that g is clipped to first.

            v' = momentum * v + (g + weight_decay * w)
            w' = w - lr * v'

        The virtual step of the architect is the same rule without clipping.
        """
        mu, weight_decay = self.store.scalar(self.momentum), self.store.scalar(self.weight_decay)
        if custom_ops.enabled():
            return custom_ops.momentum_step(w, v, g, [mu, weight_decay, lr] + ([] if limit is None else [limit]))
        if limit is not None:
            g = g * (limit / paddle.maximum(global_norm(g), limit))
        v = mu * v + (g + weight_decay * w)
        return w - lr * v, v

    def _build(self) -> list:
        w, v, g, lr = map(self.store.variable, ('theta', 'velocity', 'gradient', 'lr'))
        w, v = self.rule(w, v, g, lr, self.store.scalar(self.grad_clip))
        self.store.assign('velocity', v)
        self.store.assign('theta', w)
        return []

    def step(self, lr: float) -> None:
        """Takes one step with learning rate lr from the `gradient` in the store."""
        self.store.set_number('lr', lr)
        self._step()


class Adam:
    """Adam (arXiv 1412.6980) with L2 decay on one vector of a store.

    parameter, gradient: names of vectors; lr, weight_decay: rate, and factor of the parameter that is added to the
    gradient. The moments are the vectors adam_mean and adam_variance, the number of steps is in the store's host state.
    """

    def __init__(self, store: VariableStore, parameter: str, gradient: str, lr: float, weight_decay: float,
                 beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8):
        self.store, self.parameter, self.gradient = store, parameter, gradient
        self.lr, self.weight_decay = lr, weight_decay
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        store.host_state['adam_steps'] = 0
        for name in ('adam_mean', 'adam_variance'):
            store.set(name, np.zeros_like(store.get(parameter)), saved=True)
        self._step = StaticProgram(store, self._build)

    def _build(self) -> list:
        bias_correction = self.store.input('bias_correction', [2])      # 1 - beta^t of both moments
        parameter, mean, variance, gradient = map(self.store.variable, (
            self.parameter, 'adam_mean', 'adam_variance', self.gradient))
        scalar = self.store.scalar
        gradient = gradient + scalar(self.weight_decay) * parameter
        mean = scalar(self.beta1) * mean + scalar(1 - self.beta1) * gradient
        variance = scalar(self.beta2) * variance + scalar(1 - self.beta2) * paddle.square(gradient)
        rate = scalar(self.lr) / bias_correction[0]
        step = mean / (paddle.sqrt(variance / bias_correction[1]) + scalar(self.epsilon))
        self.store.assign('adam_mean', mean)
        self.store.assign('adam_variance', variance)
        self.store.assign(self.parameter, parameter - rate * step)
        return []

    def step(self) -> None:
        """Takes one step from the gradient in the store."""
        self.store.host_state['adam_steps'] += 1
        steps = self.store.host_state['adam_steps']
        self._step(bias_correction=np.array([1 - self.beta1 ** steps, 1 - self.beta2 ** steps], self.store.dtype))


def global_norm(vector):
    """Returns the Euclidean norm of a variable [n], as a variable [1]."""
    return paddle.sqrt(paddle.sum(paddle.square(vector), axis=0, keepdim=True))
