"""What a person types: submit.py and runs.py. Imports pneumo_dist, never the reverse."""
