"""Ways for other people's models to run on these kernels: transformers', and those made for mamba_ssm."""
