"""What the supernet and the discrete networks share: the vectors of a network, its inputs, its weights by name."""
from __future__ import annotations

from collections import namedtuple

import numpy as np
import paddle

from engine.parameters import FlatParameters
from engine.programs import VariableStore
from utils import UserError

Evaluation = namedtuple('Evaluation', 'loss top1 top5')


class FlatNetwork:
    """A network whose weights are the vector `theta` of a store.

    A subclass declares its weights in `layout`, then calls `_allocate`. From then on `store` holds theta, its
    `gradient`, the `metrics` of the last run and, if the network has them, its running `statistics`.
    """

    def __init__(self, classes: int, image_size: int, layout: FlatParameters):
        self.classes, self.image_size, self.layout = classes, image_size, layout

    def _allocate(self, place, dtype: str, rng: np.random.Generator) -> None:
        """Creates the store, with initial weights drawn from the numpy generator `rng`."""
        self.layout.assign_offsets()
        self.store = VariableStore(place or paddle.CPUPlace(), dtype)
        self.store.set('theta', self.layout.initial(rng, dtype), saved=True)
        self.store.set('gradient', np.zeros(self.size))
        self.store.set('metrics', np.zeros(len(Evaluation._fields)))
        if self.layout.statistics:
            statistics = self.layout.statistics.assign_offsets().initial(rng, dtype)
            self.store.set('statistics', statistics, saved=True)

    @property
    def size(self) -> int:
        """The number of weights, without running statistics and alpha."""
        return self.layout.size

    @property
    def shapes(self) -> dict[str, tuple]:
        """{name: shape} of all weights and running statistics."""
        return dict(self.layout.shapes, **(self.layout.statistics.shapes if self.layout.statistics else {}))

    def weights(self) -> dict[str, np.ndarray]:
        """Returns all weights and running statistics, {name: array}."""
        weights = self.layout.named(self.store.get('theta'))
        if self.layout.statistics:
            weights.update(self.layout.statistics.named(self.store.get('statistics')))
        return weights

    def set_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets the weights and running statistics {name: array}, all of them or none.

        Raises UserError for an unknown name or a wrong shape.
        """
        statistics_names = self.layout.statistics.shapes if self.layout.statistics else {}
        trained = {name: array for name, array in weights.items() if name not in statistics_names}
        vectors = {'theta': self.layout.flat(trained, self.store.get('theta'))}
        if statistics_names:
            statistics = {name: array for name, array in weights.items() if name in statistics_names}
            vectors['statistics'] = self.layout.statistics.flat(statistics, self.store.get('statistics'))
        for name, vector in vectors.items():
            self.store.set(name, vector)

    def check_complete(self, weights: dict[str, np.ndarray], without: str | tuple = ()) -> None:
        """Raises UserError when {name: array} lacks a weight whose name does not start with `without`."""
        missing = [name for name in self.shapes if name not in weights and not name.startswith(without)]
        if missing:
            raise UserError(f"weight {missing[0]!r} is missing ({len(missing)} missing in all)")

    def _inputs(self) -> tuple:
        """Returns the inputs of the program under construction: images [N, 3, H, W], labels [N, 1]."""
        return (self.store.input('images', [None, 3, self.image_size, self.image_size]),
                self.store.input('labels', [None, 1], 'int64'))

    def _assign_metrics(self, loss, logits, labels) -> None:
        """Adds to the program under construction: loss, top-1 and top-5 accuracy (fractions), for `_metrics`."""
        logits = logits.astype('float32')    # of double logits Paddle 3 gives the accuracy in the wrong precision
        accuracies = [paddle.static.accuracy(logits, labels, k=min(k, self.classes)) for k in (1, 5)]
        metrics = [paddle.reshape(value, [1]).astype(self.store.dtype) for value in (loss, *accuracies)]
        self.store.assign('metrics', paddle.concat(metrics))

    def _metrics(self) -> Evaluation:
        """Copies the results of the last run from the device, which waits for its end."""
        return Evaluation(*self.store.get('metrics').tolist())

    def feed(self, images: np.ndarray, labels: np.ndarray) -> dict:
        """Returns a batch on the device, to be passed to `run` as often as needed.

        images: [N, 3, H, W], normalised; labels: [N, 1] or [N], class numbers.
        """
        labels = np.asarray(labels, 'int64').reshape(-1, 1)
        return {'images': self.store.tensor(np.asarray(images, self.store.dtype)),
                'labels': self.store.tensor(labels)}
