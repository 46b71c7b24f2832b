"""JAX, through `jax.jit`."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from bench.peers.task import Competitor, Task, package


class JAX(Competitor):
    """JAX: loss, gradients and update in one compiled function, which reuses the memory of the old parameters.

    XLA's CPU client makes as many threads as the process may use cores, and takes no other number.
    """

    compiles = True

    def __init__(self, task: Task) -> None:
        jax = package("jax")
        jax.config.update("jax_platforms", "cpu")
        self.jax = jax
        self.update = jax.jit(functools.partial(_jax_update, jax, task.learning_rate), donate_argnums=0)
        self.arrays = [jax.numpy.array(parameter) for parameter in task.mlp.parameters]
        self.images = jax.numpy.asarray(np.divide(task.images, 255, dtype=np.float32))
        self.labels = jax.numpy.asarray(task.labels, dtype=np.int32)

    def step(self):
        self.arrays, loss = self.jax.block_until_ready(self.update(self.arrays, self.images, self.labels))
        return float(loss)

    def parameters(self):
        return [np.asarray(array) for array in self.arrays]


def _jax_update(jax: ModuleType, learning_rate: float, parameters: list, images: Any, labels: Any) -> tuple[list, Any]:
    def mean_loss(parameters: list) -> Any:
        *hidden_layers, (weights, bias) = zip(parameters[::2], parameters[1::2])
        x = images
        for hidden_weights, hidden_bias in hidden_layers:
            x = jax.nn.relu(x @ hidden_weights + hidden_bias)
        log_probabilities = jax.nn.log_softmax(x @ weights + bias)
        return -jax.numpy.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(parameters)
    return [parameter - learning_rate * change for parameter, change in zip(parameters, gradient)], loss
