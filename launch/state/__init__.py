"""The state of jobs: the ledger and its locks, queries to SLURM, progress files, the copy of the code."""
