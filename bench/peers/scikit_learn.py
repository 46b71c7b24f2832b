"""scikit-learn's multilayer perceptron."""

import numpy as np
from sklearn.neural_network import MLPClassifier
from threadpoolctl import ThreadpoolController

from bench.peers.task import Competitor, Task


class ScikitLearn(Competitor):
    """scikit-learn's `MLPClassifier`: full-batch gradient descent without momentum or weight decay, on BLAS's threads.

    A step is a call of `partial_fit`, which validates its arguments each time. The first call, on one image, allocates
    the network's arrays; our weights are then copied into them.
    """

    def __init__(self, task: Task) -> None:
        self.images = np.divide(task.images, 255, dtype=np.float32)
        self.labels = task.labels
        self.threads = task.threads
        self.blas = ThreadpoolController()
        hidden = [weights.shape[1] for weights, _ in task.mlp.layers[:-1]]
        self.network = MLPClassifier(
            hidden,
            solver="sgd",
            alpha=0,
            batch_size=1,
            learning_rate_init=task.learning_rate,
            shuffle=False,
            momentum=0,
            nesterovs_momentum=False,
        )
        classes = np.arange(task.mlp.layers[-1][0].shape[1])
        self.network.partial_fit(self.images[:1], self.labels[:1], classes=classes)
        for array, parameter in zip(self.parameters(), task.mlp.parameters):
            array[...] = parameter
        self.network.set_params(batch_size=len(self.images))

    def step(self):
        with self.blas.limit(limits=self.threads, user_api="blas"):
            self.network.partial_fit(self.images, self.labels)
        return self.network.loss_

    def parameters(self):
        return [array for layer in zip(self.network.coefs_, self.network.intercepts_) for array in layer]
