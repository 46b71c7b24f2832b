"""How fast it is: benchmarks, studies, plots and tables."""

import os

# After a product, OpenBLAS's idle threads spin for 26 ms before they sleep, and take cores from the next competitor. It
# must be set before NumPy is imported, and does not slow down products in a row.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# A notebook's MPLBACKEND may name a module that is not installed here. The figures need none.
os.environ.pop("MPLBACKEND", None)
