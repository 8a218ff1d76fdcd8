"""Mamba-2's mixer between its two projections: whole sequences, and one decode step."""
