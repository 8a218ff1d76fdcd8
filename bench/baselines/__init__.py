"""What Mamba-2 is compared with: attention and a Transformer, written plainly on torch's own kernels."""
