"""The engine: a pack of LoRA trials trained and scored together over one frozen base.

A single run is a pack with one trial. A trial in a pack ends where it ends alone, within floating-point tolerance.

layout.py      which tokens of a pass belong to which segment and which trial
attention.py   causal attention inside segments only; triton_attention.py the same as GPU kernels
frozen.py      the base's linears, quantised or not; fp8.py 8-bit floats
lora.py        adapters: their weights, and the linears that apply each to its own tokens
products.py    the low-rank products of a pass; grouped.py the same for many adapters at once on a GPU
elementwise.py what a decoder does between products; triton_kernels.py the same as GPU kernels
decoder.py     a Llama-like decoder, forward and backward written out: the fast way through the base
dropout.py     masks that depend on the trial, step and example, never on how a step is cut into passes
passes.py      cutting work into passes of at most N tokens; budget.py how many that may be
model.py       the base: packed tokens in, verdict scores or token losses out
schedule.py    the learning rate of each step
trial.py       one trial's parameters, optimizer and data order
pack.py        one step of every trial, in passes; replay.py small ones as CUDA graphs
ranks.py       the processes of one run under torchrun: shares, sums, and the first one's word
loop.py        steps until every trial has ended: when to evaluate, to checkpoint, to stop
evaluate.py    scores of adapters over a token store
generate.py    the mission's way to a verdict, for comparison: write text, look for True or False
checkpoint.py  a trial's state on disk; adapter_file.py its result in PEFT's format
"""
