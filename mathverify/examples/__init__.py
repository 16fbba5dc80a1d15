"""Labelled answers to maths questions: what a row is, where rows come from, how they are split and reported on.

This room knows nothing of prompts, tokens or models.
"""

from mathverify.examples.schema import EXAMPLE_SCHEMA, Example, Splits, iter_examples

__all__ = ["EXAMPLE_SCHEMA", "Example", "Splits", "iter_examples"]
