"""The update of alpha: the second-order approximation of DARTS (arXiv 1806.09055, section 2.3).

    min_alpha L_val(w*(alpha), alpha)    with    w*(alpha) = argmin_w L_train(w, alpha)

One step of the weights stands for w*: w' = w - xi (mu v + grad_w L_train(w, alpha) + lambda w). Then

    d_alpha = grad_alpha L_val(w', alpha) - xi * h
    h = (grad_alpha L_train(w + eps u, alpha) - grad_alpha L_train(w - eps u, alpha)) / (2 eps)

with u = grad_w' L_val(w', alpha) and eps = 0.01 / ||u||: h is u times the mixed second derivative
of L_train, by central differences. All of it is runs of the one supernet program with
vector arithmetic on the device in between; no second network is built.
"""
import numpy as np
import paddle

from model_search import by_cell_kind
from parameters import Function, MomentumSGD, norm

PERTURBATION = 0.01              # r in eps = r / ||u||
BETA1, BETA2, EPSILON = 0.5, 0.999, 1e-8


class Architect:
    """Moves alpha of a supernet by Adam on the first- or second-order gradient.

    optimizer: the MomentumSGD that trains the weights of the supernet; the virtual step uses its
    momentum, weight decay and velocity. None makes one with the defaults of the search.
    arch_learning_rate, arch_weight_decay: Adam's rate and the L2 decay of alpha (added to the gradient).
    unrolled: True for the second order, False for grad_alpha L_val(w, alpha) at the present weights.
    """

    def __init__(self, supernet, optimizer=None, arch_learning_rate=3e-4, arch_weight_decay=1e-3, unrolled=True):
        self.supernet, self.store, self.unrolled = supernet, supernet.store, unrolled
        self.optimizer = optimizer or MomentumSGD(self.store, momentum=0.9, weight_decay=3e-4, grad_clip=5.0)
        self.arch_learning_rate, self.arch_weight_decay = arch_learning_rate, arch_weight_decay
        self.steps = 0           # t of Adam
        alphas = self.store.get('alphas')
        for name in ('adam_mean', 'adam_variance', 'd_alpha'):
            self.store.set(name, np.zeros_like(alphas))
        if unrolled:
            weights = self.store.get('theta')
            for name in ('w', 'u'):
                self.store.set(name, np.zeros_like(weights))
            for name in ('validation_gradient', 'plus_gradient'):
                self.store.set(name, np.zeros_like(alphas))
            self.store.set('eps', np.zeros(1))
            self._virtual_step = Function(self.store, self._build_virtual_step)
            self._plus = Function(self.store, self._build_plus)
            self._minus = Function(self.store, self._build_minus)
            self._second_order = Function(self.store, self._build_second_order)
        self._adam = Function(self.store, self._build_adam)

    def step(self, train, valid, lr):
        """One update of alpha; train, valid: (images, labels); lr: xi, the learning rate of the weights.

        The weights and the velocity are afterwards what they were before, to the bit.
        """
        self.update(self.supernet.feed(*train), self.supernet.feed(*valid), lr)

    def update(self, train, valid, lr):
        """`step` with batches from `Supernet.feed`."""
        run, run_alphas = self.supernet.run, self.supernet.run_alphas
        xi = np.array([lr], self.store.dtype)
        if self.unrolled:
            run(train)                   # 1  g = grad_w L_train(w, alpha)
            self._virtual_step(xi=xi)    # 2  w' = w - xi (mu v + g + lambda w)
            run(valid)                   # 3  grad_alpha L_val(w', alpha),  u = grad_w' L_val(w', alpha)
            self._plus()                 # 4  eps = r / ||u||,  w + eps u
            run_alphas(train)            #    grad_alpha L_train(w + eps u, alpha)
            self._minus()                #    w - eps u
            run_alphas(train)            #    grad_alpha L_train(w - eps u, alpha)
            self._second_order(xi=xi)    # 5, 6  d_alpha, and w as it was
        else:
            run_alphas(valid)            # d_alpha = grad_alpha L_val(w, alpha)
        self.steps += 1
        bias = [1 - BETA1 ** self.steps, 1 - BETA2 ** self.steps]
        self._adam(bias=np.array(bias, self.store.dtype))

    def alpha_gradients(self):
        """d_alpha of the last step, without the weight decay: {'alphas_normal', 'alphas_reduce': [14, 8]}."""
        return by_cell_kind(self.store.get('d_alpha' if self.unrolled else 'alpha_gradient'))

    def _build_virtual_step(self):
        """w aside, theta <- w - xi (mu v + g + lambda w)."""
        xi = self.store.input('xi', [1])
        w, v, g = map(self.store.variable, ('theta', 'velocity', 'gradient'))
        mu, lamda = map(self.store.scalar, (self.optimizer.momentum, self.optimizer.weight_decay))
        virtual = w - xi * (mu * v + g + lamda * w)
        self.store.assign('w', w)
        self.store.assign('theta', virtual)
        return []

    def _build_plus(self):
        """u and grad_alpha L_val(w', alpha) aside, theta <- w + eps u."""
        w, u = map(self.store.variable, ('w', 'gradient'))
        # Where u vanishes so does h, whatever eps is, as long as it is a number.
        eps = self.store.scalar(PERTURBATION) / paddle.maximum(norm(u), self.store.scalar(1e-30))
        self.store.assign('validation_gradient', self.store.variable('alpha_gradient'))
        self.store.assign('u', u)
        self.store.assign('eps', eps)
        self.store.assign('theta', w + eps * u)
        return []

    def _build_minus(self):
        """grad_alpha L_train(w + eps u, alpha) aside, theta <- w - eps u."""
        w, u, eps = map(self.store.variable, ('w', 'u', 'eps'))
        self.store.assign('plus_gradient', self.store.variable('alpha_gradient'))
        self.store.assign('theta', w - eps * u)
        return []

    def _build_second_order(self):
        """d_alpha <- grad_alpha L_val(w', alpha) - xi h, theta <- w."""
        xi = self.store.input('xi', [1])
        outer, plus, minus, eps, w = map(self.store.variable, (
            'validation_gradient', 'plus_gradient', 'alpha_gradient', 'eps', 'w'))
        h = (plus - minus) / (eps + eps)
        self.store.assign('d_alpha', outer - xi * h)
        self.store.assign('theta', w)
        return []

    def _build_adam(self):
        """Adam (arXiv 1412.6980) with L2 decay: bias [2] holds 1 - beta^t of both moments."""
        bias = self.store.input('bias', [2])
        alphas, mean, variance, gradient = map(self.store.variable, (
            'alphas', 'adam_mean', 'adam_variance', 'd_alpha' if self.unrolled else 'alpha_gradient'))
        scalar = self.store.scalar
        gradient = gradient + scalar(self.arch_weight_decay) * alphas
        mean = scalar(BETA1) * mean + scalar(1 - BETA1) * gradient
        variance = scalar(BETA2) * variance + scalar(1 - BETA2) * paddle.square(gradient)
        rate = scalar(self.arch_learning_rate) / bias[0]
        step = mean / (paddle.sqrt(variance / bias[1]) + scalar(EPSILON))
        self.store.assign('adam_mean', mean)
        self.store.assign('adam_variance', variance)
        self.store.assign('alphas', alphas - rate * step)
        return []
