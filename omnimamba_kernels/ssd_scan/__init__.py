"""Mamba-2's chunked scan (state-space duality, SSD)."""
