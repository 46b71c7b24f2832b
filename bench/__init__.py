"""Performance measurements: benchmarks, studies, plots and tables."""

import os

# After a product, OpenBLAS's idle threads busy-wait for 26 ms before they sleep, on cores that the next competitor
# needs. The variable must be set before NumPy is imported. It does not slow down back-to-back products.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# A notebook's MPLBACKEND may name a module that is not installed here. The figures need none.
os.environ.pop("MPLBACKEND", None)
