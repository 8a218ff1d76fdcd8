"""Depthwise causal convolution over time, with its decode update and the states of packed sequences."""
