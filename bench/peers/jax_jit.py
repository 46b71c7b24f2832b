"""JAX, through `jax.jit`."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from bench.peers.task import Learner, Task, UnavailableError, package


class JAX(Learner):
    """JAX: loss, gradients and update in one jitted function, to which the old parameters' buffers are donated.

    XLA's CPU client starts one thread per core that the process may use; it has no option for another number.
    """

    compiles = True

    def __init__(self, task: Task) -> None:
        jax = package("jax")
        jax.config.update("jax_platforms", "cpu")
        self.jax = jax
        self.learning_rate = task.learning_rate
        self.arrays = [jax.numpy.array(parameter) for parameter in task.mlp.parameters]
        self.all = self._prepare(task.images, task.labels)

    def step(self):
        return self._descend("all", *self.all)

    def learn(self, images, labels):
        return self._descend("all", *self._prepare(images, labels))

    def learn_rows(self, rows):
        return self._descend("rows", *self.all, rows.astype(np.int32))

    def accuracy(self):
        return float(_functions()["accuracy"](self.arrays, *self.all))

    def parameters(self):
        return [np.asarray(array) for array in self.arrays]

    def _prepare(self, images, labels):
        floats = self.jax.numpy.asarray(np.divide(images, 255, dtype=np.float32))
        return floats, self.jax.numpy.asarray(labels, dtype=np.int32)

    def _descend(self, function, *batch):
        update = _functions()[function]
        self.arrays, loss = self.jax.block_until_ready(update(self.arrays, self.learning_rate, *batch))
        return float(loss)


class JAXScan(JAX):
    """The same with `jax.lax.scan` over parts of 1,000 images, whose activations stay in the cache."""

    def step(self):
        return self._descend("scan", *self.all)

    def learn(self, images, labels):
        return self._descend("scan", *self._prepare(images, labels))

    def learn_rows(self, rows):
        if len(rows) < PART:
            raise UnavailableError(f"batches of {len(rows)} images have no parts of {PART:,}")
        return self._descend("scan rows", *self.all, rows.astype(np.int32))


class JAXSteps(JAX):
    """The same with `jax.lax.scan` over several steps in one call, which saves most of a small step's overhead.

    A scan takes arrays of one shape, so batches of different sizes are stepped over one by one.
    """

    def step(self):
        raise UnavailableError("a full batch is one step")

    def learn_all(self, batches):
        if len({len(labels) for _, labels in batches}) > 1:
            super().learn_all(batches)
        else:
            images, labels = map(np.stack, zip(*batches))
            self._descend_all("steps", *self._prepare(images, labels))

    def learn_rows_all(self, batches):
        if len(set(map(len, batches))) > 1:
            super().learn_rows_all(batches)
        else:
            self._descend_all("steps over rows", *self.all, np.stack(batches).astype(np.int32))

    def _descend_all(self, function, *steps):
        update = _functions()[function]
        self.arrays, _ = self.jax.block_until_ready(update(self.arrays, self.learning_rate, *steps))


PART = 1000


@functools.cache
def _functions() -> dict[str, Any]:
    """Jitted once, so that a second network of the same shape needs no compilation."""
    jax = package("jax")

    def loss(parameters: list, images: Any, labels: Any) -> Any:
        log_probabilities = jax.nn.log_softmax(_logits(jax, parameters, images))
        return -jax.numpy.take_along_axis(log_probabilities, labels[:, None], axis=1).sum()

    gradient = jax.value_and_grad(loss)

    def update(parameters: list, rate: float, images: Any, labels: Any) -> tuple[list, Any]:
        return _moved(parameters, rate, len(labels), gradient(parameters, images, labels))

    def update_rows(parameters: list, rate: float, images: Any, labels: Any, rows: Any) -> tuple[list, Any]:
        return update(parameters, rate, images[rows], labels[rows])

    def update_scan(parameters: list, rate: float, images: Any, labels: Any) -> tuple[list, Any]:
        def add(total: Any, part: tuple) -> tuple[Any, None]:
            return jax.tree.map(jax.numpy.add, total, gradient(parameters, *part)), None

        parts = len(labels) // PART
        whole, rest = slice(parts * PART), slice(parts * PART, None)
        split = images[whole].reshape(parts, PART, images.shape[1]), labels[whole].reshape(parts, PART)
        total, _ = jax.lax.scan(add, gradient(parameters, images[rest], labels[rest]), split)
        return _moved(parameters, rate, len(labels), total)

    def update_scan_rows(parameters: list, rate: float, images: Any, labels: Any, rows: Any) -> tuple[list, Any]:
        return update_scan(parameters, rate, images[rows], labels[rows])

    def update_steps(parameters: list, rate: float, images: Any, labels: Any) -> tuple[list, Any]:
        return jax.lax.scan(lambda moved, batch: update(moved, rate, *batch), parameters, (images, labels))

    def update_steps_rows(parameters: list, rate: float, images: Any, labels: Any, rows: Any) -> tuple[list, Any]:
        return jax.lax.scan(lambda moved, batch: update_rows(moved, rate, images, labels, batch), parameters, rows)

    def accuracy(parameters: list, images: Any, labels: Any) -> Any:
        return (_logits(jax, parameters, images).argmax(1) == labels).mean()

    updates = {
        "all": update,
        "rows": update_rows,
        "scan": update_scan,
        "scan rows": update_scan_rows,
        "steps": update_steps,
        "steps over rows": update_steps_rows,
    }
    return {"accuracy": jax.jit(accuracy), **{k: jax.jit(f, donate_argnums=0) for k, f in updates.items()}}


def _logits(jax: ModuleType, parameters: list, images: Any) -> Any:
    *hidden_layers, (weights, bias) = zip(parameters[::2], parameters[1::2])
    x = images
    for hidden_weights, hidden_bias in hidden_layers:
        x = jax.nn.relu(x @ hidden_weights + hidden_bias)
    return x @ weights + bias


def _moved(parameters: list, rate: float, count: int, summed: tuple) -> tuple[list, Any]:
    loss, gradient = summed
    return [parameter - rate / count * change for parameter, change in zip(parameters, gradient)], loss / count
