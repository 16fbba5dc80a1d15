"""Comparing runs: which is better, by how much, and is it real. `python -m mathverify.compare FOLDER...`

reading.py    places (run folders, sweep folders, study URLs) -> runs, lazily read; everything else builds on it
studies.py    the trials of an Optuna study and where their folders are
matrix.py     many runs on the same test rows as arrays: who was right where
paired.py     two runs on the same rows: exact tests, bootstrap over questions, Holm
seeds.py      configurations (runs equal but for the seed): mean, spread, and tests that count the luck of the seed
power.py      how many more rows or seeds would settle a difference
verdict.py    what may be said: winner or tie, what it would take, how much choosing flattered the winner
wording.py    a verdict in sentences
table.py      rows and columns; as CSV, Markdown, LaTeX
show.py       tables and sentences on a terminal of any width
report/       report.html and figures for a paper; needs the extra mathverify[report]
wandb_views.py  the saved view and the report of a W&B project

No torch here: it starts fast and works anywhere. Only reads; runs and studies are never changed.
"""
