"""One decode step of a selective state-space model."""
