"""Where numbers go while a run trains: metrics.jsonl always, Weights & Biases beside it. Decides nothing about runs.

local.py is the file in the run folder; wandb_tracker.py mirrors it, through mirror.py (one W&B run and the thread that
talks to it), service.py (what all W&B runs of a process share) and account.py (online or not). vocabulary.py is what
W&B is told things are called. W&B may be slow, broken or absent: training never waits for it.
"""

from mathverify.tracking.local import METRICS, Tracker
from mathverify.tracking.mirror import uploads_in_background
from mathverify.tracking.vocabulary import final_numbers
from mathverify.tracking.wandb_tracker import WandbTracker, check_tracking, open_tracker

__all__ = [
    "METRICS",
    "Tracker",
    "WandbTracker",
    "check_tracking",
    "final_numbers",
    "open_tracker",
    "uploads_in_background",
]
