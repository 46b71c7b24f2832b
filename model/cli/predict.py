"""``python -m model predict``."""

import numpy as np

from kernels import get_backend
from model.cli import options as opt
from model.cli.console import print_result, print_status, show
from model.cli.tables import probability_bars
from model.extras.checkpoint import load

SURE = 0.8  # below this probability, also print the second guess


def predict_command(picture: opt.Picture, checkpoint: opt.Trained) -> None:
    """Say which digit a picture shows."""
    from model.extras.picture import read_picture  # SciPy takes an eighth of a second to import

    mlp, _, config = load(checkpoint)
    if len(mlp.layers[0][0]) != 784:
        raise ValueError(f"{checkpoint}: its network does not take images of 28 x 28 pixels: use one that does")
    (probabilities,) = mlp.probabilities(get_backend("numpy"), read_picture(picture)[None])
    if np.isnan(probabilities).any():
        raise ValueError(f"{checkpoint}: its parameters are too large: the logits overflow. Use another checkpoint")
    *_, second, first = [0, *np.argsort(probabilities)]  # a single class has no second
    unsure = f", or perhaps {second}: the network is unsure" if probabilities[first] < SURE else ""
    print_result(f"{picture} shows the {'label' if config.dataset == 'idx' else 'digit'} {first}{unsure}")
    if config.dataset == "digits28":
        print_status(
            f"{checkpoint} was trained on digits28 and recognises only half of MNIST's digits: train on mnist instead"
        )
    show(probability_bars(probabilities))
