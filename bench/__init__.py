"""Performance measurements: benchmarks, studies, plots and tables."""

import os

# After a product, OpenBLAS's idle threads busy-wait for 0.1 s before they sleep (Zen 5), on cores that the next
# competitor needs. The variable must be set before NumPy is imported. It does not slow down back-to-back products.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

# Apple's BLAS, Accelerate, obeys only this variable, not threadpoolctl. Without it, its threads would run beside those
# that split the images, and beside kernels on one thread. It holds for every package that uses Accelerate, such as
# PyTorch on macOS.
os.environ.setdefault("VECLIB_MAXIMUM_THREADS", "1")

# A notebook's MPLBACKEND may name a module that is not installed here. The figures need none.
os.environ.pop("MPLBACKEND", None)
