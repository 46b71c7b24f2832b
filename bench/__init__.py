"""How fast it is: benchmarks, studies, plots and tables."""

import os

# After a product, OpenBLAS's idle threads spin for 26 ms before they sleep, and take a core from whoever is measured
# next. Must be set before NumPy is imported; products in a row are not slower for it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# That of a notebook may name a module that is not installed here; our figures need none.
os.environ.pop("MPLBACKEND", None)
