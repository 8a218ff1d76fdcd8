"""The demo: real handwritten digits, drawn from words and described in words by one small model."""

from .experiment import run
from .settings import Settings

__all__ = ["Settings", "run"]
