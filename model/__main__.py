"""``python -m model``: the command line, see `model.cli`."""

import gc

from model.cli import main

if __name__ == "__main__":
    # Numba makes a hundred thousand objects that stay. Looking for garbage among them takes a fifth of a second, most
    # of it when the process ends.
    gc.set_threshold(100_000)
    try:
        main()
    finally:
        gc.freeze()
