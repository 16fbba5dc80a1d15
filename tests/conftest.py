"""Fixtures for all tests: the real services of services.py."""

from .services import postgres, slurm

__all__ = ["postgres", "slurm"]
