"""``python -m bench``: benchmarks and studies, see `bench.commands`."""

if __name__ == "__main__":
    import os
    import signal

    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # a Ctrl-C during the imports
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    from bench.commands import main

    signal.signal(signal.SIGINT, handler)
    main()
