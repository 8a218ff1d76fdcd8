"""RMSNorm over groups of the last dimension, gated by SiLU before or after."""
