"""Flat vectors of weights and the static programs that share them.

All weights of a network lie in one float vector theta, so that an update of a network is vector
arithmetic: nothing is looped over parameters, neither in Python nor in a graph. A `Layout` maps the
names of the weights to slices of the vector; a `Store` keeps the named vectors on the device; a
`Function` is a static program that reads and writes them.
"""
import math
from collections import namedtuple

import numpy as np
import paddle

from utils import UserError, in_pir_mode

paddle.enable_static()


class Block:
    """n weights of equal shape [out, ...] that one batched operation uses as one tensor [n * out, ...].

    `tensor` is the variable of the program under construction, set by `Blocks.unpack`; `uses` counts
    there the positions of an image that the weights are multiplied at. `bundle` is the `Bundle` that it belongs to,
    None for most; its blocks have no tensors of their own where a program takes the bundle.
    """

    def __init__(self, count, shape):
        self.count, self.shape = count, tuple(shape)
        self.rows, self.tail = count * self.shape[0], self.shape[1:]
        self.size = self.rows * math.prod(self.tail)
        self.offset, self.bundle = None, None
        self.tensor, self.uses = None, 0


class Bundle:
    """Blocks of one family, declared one after the other, that an operator takes as one `tensor` [all rows, ...]."""

    def __init__(self, blocks):
        self.rows = sum(block.rows for block in blocks)
        self.tensor = None
        for block in blocks:
            block.bundle = self


class Blocks:
    """Blocks side by side in one flat vector.

    Blocks whose shapes agree behind the first axis (a family, such as all depthwise 3x3 kernels of a
    network) are neighbours in the vector. A program then takes a whole family with one slice and one
    reshape and cuts it along the first axis, instead of slicing and reshaping weight by weight: a few
    dozen operators where there would be a thousand.
    """

    def __init__(self):
        self.blocks = []
        self.size = 0

    def add(self, count, shape):
        block = Block(count, shape)
        self.blocks.append(block)
        return block

    def bundles(self, start):
        """Makes a `Bundle` of all blocks of each family that were added from number `start` on: {shape[1:]: Bundle}."""
        families = {}
        for block in self.blocks[start:]:
            families.setdefault(block.tail, []).append(block)
        return {tail: Bundle(blocks) for tail, blocks in families.items()}

    def seal(self):
        """Places all blocks that were added; returns self."""
        self.families = {}
        for block in self.blocks:
            self.families.setdefault(block.tail, []).append(block)
        self.size = 0
        for blocks in self.families.values():
            for block in blocks:
                block.offset = self.size
                self.size += block.size
        return self

    def unpack(self, vector, bundled=False):
        """Gives every block its tensor: a piece of `vector` ([size], in the program under construction).

        bundled: gives every bundle its tensor instead, and only what is in none to the block.
        """
        self._pieces = []
        families = _split(vector, [sum(b.size for b in blocks) for blocks in self.families.values()])
        for (tail, blocks), family in zip(self.families.items(), families):
            if tail:
                family = paddle.reshape(family, [-1, *tail])
            pieces = list(dict.fromkeys(bundled and block.bundle or block for block in blocks))
            for piece, tensor in zip(pieces, _split(family, [piece.rows for piece in pieces])):
                piece.tensor = tensor
            for block in blocks:
                block.uses = 0
            self._pieces.append(pieces)

    def pack(self):
        """The inverse of `unpack`: the vector [size] of all tensors as they are now."""
        families = [_concat([piece.tensor for piece in pieces]) for pieces in self._pieces]
        return _concat([paddle.reshape(family, [-1]) if len(family.shape) > 1 else family for family in families])


def _split(x, sizes):
    return paddle.split(x, sizes, axis=0) if len(sizes) > 1 else [x]


def _concat(pieces):
    return paddle.concat(pieces, axis=0) if len(pieces) > 1 else pieces[0]


class Layout(Blocks):
    """The named weights of a network as slices of one vector theta.

    running_statistics: whether the network keeps means and variances for use after the training; they
    have a vector and a layout of their own, `statistics` (None without). training: whether the program
    under construction normalises by its batch and updates them.
    """

    def __init__(self, running_statistics=False):
        super().__init__()
        self._names = {}
        self.statistics = Layout() if running_statistics else None
        self.training = True

    def declare(self, names, shape, bound=None, value=0.0):
        """Declares len(names) weights of one shape, used together as one `Block`.

        They start uniform in +-bound; without a bound (None) convolution's 1 / sqrt(fan_in) with
        fan_in = prod(shape[1:]), or, for a vector, the constant `value`.
        """
        block = self.add(len(names), shape)
        if bound is None and len(shape) > 1:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
        for index, name in enumerate(names):
            if name in self._names:
                raise ValueError(f"{name} is declared twice")
            self._names[name] = (block, index, bound, value)
        return block

    @property
    def shapes(self):
        """{name: shape} of all weights."""
        return {name: block.shape for name, (block, *_) in self._names.items()}

    def count(self, without=()):
        """The number of weights whose names do not start with `without`, a prefix or a tuple of them."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not name.startswith(without))

    def multiply_adds(self, without=()):
        """What convolutions and linear layers of the program built last multiply for one image."""
        blocks = {id(block): block for name, (block, *_) in self._names.items() if not name.startswith(without)}
        return sum(block.size * block.uses for block in blocks.values())

    def create_parameters(self):
        """Gives every block (of one weight each) a parameter of its own, named as the weight, as its tensor."""
        for name, (block, *_) in self._names.items():
            block.tensor, block.uses = paddle.static.create_parameter(
                block.shape, 'float32', name=name, default_initializer=paddle.nn.initializer.Constant(0.0)), 0

    def slices(self):
        """Yields (name, slice of theta, shape)."""
        for name, (block, index, *_) in self._names.items():
            size = block.size // block.count
            start = block.offset + index * size
            yield name, slice(start, start + size), block.shape

    def named(self, vector):
        """{name: array} from a flat vector [size]; the arrays are copies."""
        return {name: vector[where].reshape(shape).copy() for name, where, shape in self.slices()}

    def flat(self, weights, vector):
        """A copy of `vector` [size] with the weights of {name: array} in it.

        Raises UserError for an unknown name, a wrong shape and what is no real number; weights that are
        not named keep their values.
        """
        unknown = sorted(set(weights) - set(self._names))
        if unknown:
            raise UserError(f"unknown weight {unknown[0]!r} ({len(unknown)} unknown in all)")
        vector = vector.copy()
        for name, where, shape in self.slices():
            if name in weights:
                array = np.asarray(weights[name])
                check_numbers(name, array)
                if array.shape != shape:
                    raise UserError(f"weight {name} has shape {list(array.shape)}, expected {list(shape)}")
                vector[where] = array.reshape(-1)
        return vector

    def initial(self, rng, dtype):
        """A fresh vector [size], drawn from the numpy generator `rng`."""
        vector = np.empty(self.size, dtype)
        for (name, where, shape), (*_, bound, value) in zip(self.slices(), self._names.values()):
            size = where.stop - where.start
            vector[where] = value if bound is None else rng.uniform(-bound, bound, size)
        return vector


def check_numbers(name, array):
    """Raises UserError unless the array is of real numbers, all of them finite."""
    if array.dtype.kind not in 'fiu' or not np.isfinite(array).all():
        raise UserError(f"{name} is not of finite real numbers ({array.dtype})")


class Store:
    """Named vectors on one device, shared by the static programs that are compiled for it.

    place: a paddle.CPUPlace() or paddle.CUDAPlace(i); dtype: 'float32' or 'float64' of all vectors.
    """

    def __init__(self, place, dtype='float32'):
        self.place, self.dtype = place, dtype
        self.scope = paddle.base.core.Scope()
        self.functions = []
        self._names = []

    def set(self, name, array):
        """Writes a numpy array to the vector `name`, which exists from then on."""
        if name not in self._names:
            self._names.append(name)
        self.scope.var(name).get_tensor().set(np.ascontiguousarray(array, self.dtype), self.place)

    def get(self, name):
        """The vector `name` as a numpy array (a copy)."""
        return np.array(self.scope.find_var(name).get_tensor())

    def variable(self, name, trainable=False):
        """The vector `name` (which `set` has made) in the program under construction."""
        shape = self.scope.find_var(name).get_tensor().shape()
        variable = paddle.static.create_parameter(
            shape, self.dtype, name=name, default_initializer=paddle.nn.initializer.Constant(0.0))
        variable.stop_gradient = not trainable
        return variable

    def assign(self, name, value):
        """Lets the program under construction write `value` to the vector `name`, on the device."""
        paddle.assign(value, output=self.variable(name))

    def input(self, name, shape, dtype=None):
        """An input of the program under construction; None in `shape` is the size of the batch."""
        dtype = dtype or self.dtype
        self.functions[-1].inputs[name] = (shape, dtype)
        return paddle.static.data(name, shape, dtype)

    def scalar(self, value):
        """A constant [1] of the program under construction, in the store's precision.

        A Python number in a product with a variable would be rounded to float32 by Paddle.
        """
        return constant([1], value, self.dtype)

    def tensor(self, array):
        """A tensor on the device, to be fed more than once without a second transfer."""
        core = paddle.base.core
        tensor = core.DenseTensor() if hasattr(core, 'DenseTensor') else core.LoDTensor()
        tensor.set(np.ascontiguousarray(array), self.place)
        return tensor

    @property
    def operators(self):
        """The number of operators of all programs over this store."""
        return sum(function.operators for function in self.functions)

    def warm_up(self):
        """Runs every program once on a dummy image, which prepares the executors; no vector is changed."""
        vectors = {name: self.get(name) for name in self._names}
        rng = np.random.default_rng(0)
        for function in self.functions:
            function(**{name: rng.uniform(0.5, 1.5, [1 if size is None else size for size in shape]).astype(dtype)
                        for name, (shape, dtype) in function.inputs.items()})
        for name, array in vectors.items():
            self.set(name, array)


class Function:
    """A static program over the vectors of a store, compiled once.

    `build()` is called with the program as the default and returns the list of variables to fetch. A
    call takes the inputs by name (numpy arrays or `Store.tensor`) and returns the fetched values as
    numpy arrays.
    """

    def __init__(self, store, build):
        self.store, self.inputs = store, {}
        store.functions.append(self)
        self.program = paddle.static.Program()
        _constants.clear()
        with paddle.static.program_guard(self.program, paddle.static.Program()):
            self.fetches = build()
        _constants.clear()
        _simplify(self.program)
        # One executor a program: an executor keeps only eight prepared programs and prepares the
        # others anew at every call.
        self._executor = paddle.static.Executor(store.place)
        self.operators = len(self.program.global_block().ops)

    def __call__(self, **feed):
        return self._executor.run(self.program, feed=feed, fetch_list=self.fetches, scope=self.store.scope)


_constants = {}


def constant(shape, value, dtype, trainable=False):
    """A constant of the program under construction, made once a program however often it is asked for."""
    key = (tuple(shape), value, str(dtype), trainable)
    if key not in _constants:
        _constants[key] = paddle.full(shape, value, dtype)
        _constants[key].stop_gradient = not trainable
    return _constants[key]


def _simplify(program):
    """Takes operators without an effect out of a program of Paddle 3 (in 2.6 there are no such operators).

    Every shape, axis and kernel size is an operator there, and the gradient of a sum copies the
    incoming gradient once a summand; the executor's preparation grows faster than the number of
    operators.
    """
    if not in_pir_mode():
        return
    paddle.base.libpaddle.pir.apply_cse_pass(program)
    block = program.global_block()
    for operator in block.ops:
        if _is_copy(operator):
            operator.result(0).replace_all_uses_with(operator.operand_source(0))
            block.remove_op(operator)


def _is_copy(operator):
    """Whether a Paddle 3 operator multiplies by the constant 1 and adds 0."""
    if operator.name() != 'pd_op.scale' or operator.attrs()['bias'] != 0.0:
        return False
    factor = operator.operand_source(1).get_defining_op()
    return factor.name() == 'pd_op.full' and factor.attrs()['value'] == 1.0


Evaluation = namedtuple('Evaluation', 'loss top1 top5')


class FlatNetwork:
    """What the supernet and the discrete networks have in common.

    A network declares its weights in `layout`, then calls `_place`; from then on `store` holds the
    vector theta, its gradient and, if there are any, the running statistics.
    """

    def __init__(self, classes, image_size, layout):
        self.classes, self.image_size, self.layout = classes, image_size, layout

    def _place(self, place, dtype, rng):
        """Makes the store, with initial weights drawn from the numpy generator `rng`."""
        self.layout.seal()
        self.store = Store(place or paddle.CPUPlace(), dtype)
        self.store.set('theta', self.layout.initial(rng, dtype))
        self.store.set('gradient', np.zeros(self.size))
        if self.layout.statistics:
            self.store.set('statistics', self.layout.statistics.seal().initial(rng, dtype))

    @property
    def size(self):
        """The number of weights (running statistics and alpha are none)."""
        return self.layout.size

    @property
    def shapes(self):
        """{name: shape} of all weights and running statistics."""
        return dict(self.layout.shapes, **(self.layout.statistics.shapes if self.layout.statistics else {}))

    def weights(self):
        """All weights and running statistics, {name: array}."""
        weights = self.layout.named(self.store.get('theta'))
        if self.layout.statistics:
            weights.update(self.layout.statistics.named(self.store.get('statistics')))
        return weights

    def set_weights(self, weights):
        """Sets what {name: array} names; UserError for an unknown name or a wrong shape."""
        kept = self.layout.statistics.shapes if self.layout.statistics else {}
        trained = {name: array for name, array in weights.items() if name not in kept}
        vectors = {'theta': self.layout.flat(trained, self.store.get('theta'))}
        if kept:
            statistics = {name: array for name, array in weights.items() if name in kept}
            vectors['statistics'] = self.layout.statistics.flat(statistics, self.store.get('statistics'))
        for name, vector in vectors.items():        # all of them, or none if one cannot be made
            self.store.set(name, vector)

    def check_complete(self, weights, without=()):
        """Raises UserError when {name: array} lacks a weight whose name does not start with `without`."""
        missing = [name for name in self.shapes if name not in weights and not name.startswith(without)]
        if missing:
            raise UserError(f"weight {missing[0]!r} is missing ({len(missing)} missing in all)")

    def _inputs(self):
        """The inputs of the program under construction: images [N, 3, H, W], labels [N, 1]."""
        return (self.store.input('images', [None, 3, self.image_size, self.image_size]),
                self.store.input('labels', [None, 1], 'int64'))

    def _accuracies(self, logits, labels):
        """Top-1 and top-5 accuracy (fractions) as variables."""
        return [paddle.static.accuracy(logits, labels, k=min(k, self.classes)) for k in (1, 5)]

    def feed(self, images, labels):
        """A batch on the device, to be given to `run` as often as needed.

        images: [N, 3, H, W], normalised; labels: [N, 1] or [N], class numbers.
        """
        labels = np.asarray(labels, 'int64').reshape(-1, 1)
        return {'images': self.store.tensor(np.asarray(images, self.store.dtype)),
                'labels': self.store.tensor(labels)}


class MomentumSGD:
    """SGD with momentum on the vector theta of a store: the weight step of search and training.

    Each step clips `gradient` to a global norm, then adds the weight decay:
        g <- g * min(1, grad_clip / ||g||) + weight_decay * theta
        velocity <- momentum * velocity + g
        theta <- theta - lr * velocity
    """

    def __init__(self, store, momentum, weight_decay, grad_clip):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.store = store
        store.set('velocity', np.zeros_like(store.get('theta')))

        def build():
            lr = store.input('lr', [1])
            theta, velocity, gradient = map(store.variable, ('theta', 'velocity', 'gradient'))
            mu, lamda, limit = map(store.scalar, (momentum, weight_decay, grad_clip))
            gradient = gradient * (limit / paddle.maximum(norm(gradient), limit))
            velocity = mu * velocity + (gradient + lamda * theta)
            store.assign('velocity', velocity)
            store.assign('theta', theta - lr * velocity)
            return []
        self._step = Function(store, build)

    def step(self, lr):
        """One step with learning rate lr from the `gradient` in the store."""
        self._step(lr=np.array([lr], self.store.dtype))


def norm(vector):
    """The Euclidean norm of a variable [n], as a variable [1]."""
    return paddle.sqrt(paddle.sum(paddle.square(vector), axis=0, keepdim=True))
