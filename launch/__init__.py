"""The two commands, submit.py and runs.py. Imports pneumo_dist, never the reverse."""
