"""What the CUDA scan leaves to another back end: shapes whose backward would not fit a small chip's shared memory."""

import pytest

from omnimamba_kernels.ssd_scan.cuda_impl import too_large

SMALL, LARGE = 99 << 10, 227 << 10


@pytest.mark.parametrize(
    "states, gated, shared, fits",
    [
        (256, True, LARGE, True),
        (128, False, SMALL, True),
        (64, True, SMALL, True),
        (128, True, SMALL, False),
        (256, False, SMALL, False),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_both_sizes(states, gated, shared, fits):
    reason = too_large(states, gated, shared)
    assert (reason is None) == fits
    assert fits or (str(shared) in reason and str(states) in reason)
