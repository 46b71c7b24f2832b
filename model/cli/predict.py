"""``python -m model predict``."""

import numpy as np

from kernels import get_backend
from model.cli import options as opt
from model.cli.console import show, tell
from model.cli.tables import probability_bars
from model.extras.checkpoint import load


def predict_command(picture: opt.Picture, checkpoint: opt.Trained) -> None:
    """Say which digit a picture shows."""
    from model.extras.picture import read_picture  # SciPy takes an eighth of a second to import

    mlp = load(checkpoint).mlp
    if (mlp.layers[0][0].shape[0], len(mlp.layers[-1][1])) != (784, 10):
        raise ValueError(
            f"{checkpoint}: its network is not for digits of 28 x 28 pixels. Train one on mnist or digits28"
        )
    (probabilities,) = mlp.probabilities(get_backend("numpy"), read_picture(picture)[None])
    if np.isnan(probabilities).any():
        raise ValueError(f"{checkpoint}: its parameters are too large to compute with. Use another checkpoint")
    tell(f"{picture} shows the digit {probabilities.argmax()}")
    show(probability_bars(probabilities))
