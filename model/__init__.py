"""A multilayer perceptron on MNIST, trained by one loop on interchangeable kernels."""
