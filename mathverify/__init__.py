"""mathverify: which LoRA settings verify maths answers best, and is the difference real?"""

__version__ = "0.1.0"
