"""Measurements anyone can repeat: ``pytest bench/`` checks, times, and keeps what it found under bench/results/."""
