"""The benchmarks by name."""

from __future__ import annotations

from . import gqa, mme, pope, vqav2
from .question import Benchmark, Question

BENCHMARKS = {
    "pope": Benchmark(pope.read, pope.score),
    "mme": Benchmark(mme.read, mme.score, ending=""),  # its questions say how to answer
    "gqa": Benchmark(gqa.read, gqa.score),
    "vqav2": Benchmark(vqav2.read, vqav2.score),
}

__all__ = ["BENCHMARKS", "Benchmark", "Question"]
