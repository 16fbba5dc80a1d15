"""Studies: a Hydra sweeper over Optuna that resumes, prunes, wastes no trial and shares a study between workers.

plugin.py is what Hydra sees and imports nothing heavy; everything else here is imported when a sweep starts. The pack
launcher, which trains a sweep's runs together on one base, is here too: pack_launcher.py, packs.py, ticket.py.

Not exercised by a test: databases other than PostgreSQL and sqlite, two machines for real (tests give processes of one
machine two names), real GPUs dealt out to trials (tests use names of devices), Slurm on more than one node, Ray on more
than one machine, and clusters that launchers reach over the network.
"""
