"""Imported by the server that commands are forked from (commands.py): everything heavy that a run or a sweep imports."""

import optuna
import pydantic
import scipy.special
import scipy.stats
import torch
import transformers.models.llama.modeling_llama

import mathverify.engine.generate
import mathverify.prepare
import mathverify.run
import mathverify.screen
import mathverify.sweep.pack_launcher
import mathverify.sweep.packs
import mathverify.sweep.sweeper

__all__ = ["mathverify", "optuna", "pydantic", "scipy", "torch", "transformers"]
