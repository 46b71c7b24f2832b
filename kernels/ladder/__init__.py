"""The ladder: one matrix product, from three Python loops to the speed of BLAS."""
