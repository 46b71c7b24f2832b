"""``python -m model``: the command line, see `model.cli`."""

if __name__ == "__main__":
    import gc
    import os
    import signal

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Ctrl-C during the imports, before `model.cli` listens
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    from model.cli import main

    # Numba creates a hundred thousand long-lived objects. Traversing them in garbage collection takes a fifth of a
    # second, mostly at exit.
    gc.set_threshold(100_000)
    try:
        main()
    finally:
        gc.freeze()
