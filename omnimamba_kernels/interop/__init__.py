"""Ways for other people's models to run on these kernels."""
