"""Every operation and whole models on a GPU, against every peer that is there: bench.gpu_problems, in bfloat16.

Times are by events, with a cold cache; short calls and decode steps as CUDA graphs too; beside them clocks, what held
them back, and energy. A wrong result, anyone's, fails, and one of ours that breaks; a peer that cannot run says why.
"""

from __future__ import annotations

import pytest

from .gpu_run import ORDER


@pytest.mark.parametrize("op", ORDER)
def test_operation(gpu_run, op):
    part = gpu_run.measure(op)
    assert part.status != "failed", f"{part.detail} {'; '.join(part.failures)}"
