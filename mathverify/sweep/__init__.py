"""Studies: a Hydra sweeper over Optuna that resumes, prunes, wastes no trial and shares a study between workers.

plugin.py is what Hydra sees and imports nothing heavy; everything else here is imported when a sweep starts.
"""
