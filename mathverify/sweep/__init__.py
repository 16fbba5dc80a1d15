"""Studies: a Hydra sweeper over Optuna that resumes, prunes, wastes no trial and shares a study between workers.

plugin.py is what Hydra sees and imports nothing heavy; everything else here is imported when a sweep starts. The pack
launcher, which trains a sweep's runs together on one base, is here too: pack_launcher.py, packs.py, ticket.py.

Not yet exercised by a test: databases as storage (PostgreSQL's lock in storage.py, passwords in URLs), launchers other
than Hydra's basic one, and streaming ones (sweeper.py), workers on another machine (liveness.Watch),
custom_search_space, and points that run out of memory (proposals.py).
"""
