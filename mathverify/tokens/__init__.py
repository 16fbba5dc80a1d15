"""Prompts as token ids: the cached store that training and evaluation read, and the doctor that checks a tokenizer."""

from mathverify.tokens.doctor import Diagnosis, examine
from mathverify.tokens.store import TokenStore, tokenize
from mathverify.tokens.verdicts import VerdictTokens, verdict_tokens

__all__ = ["Diagnosis", "TokenStore", "VerdictTokens", "examine", "tokenize", "verdict_tokens"]
