"""``omnimamba evaluate``: the benchmarks of the paper, from the files that their authors give out.

pope.py mme.py gqa.py vqav2.py   what is asked and how answers are scored, a file a benchmark
judge.py answers.py              a benchmark from files to scores; the model's answers, kept as they come
drawings.py fid.py               drawings of many captions; how far they are from real pictures
"""

from .benchmark import BENCHMARKS, Benchmark, Question
from .drawings import draw_captions
from .fid import fid
from .judge import judge

__all__ = ["BENCHMARKS", "Benchmark", "Question", "draw_captions", "fid", "judge"]
