"""What is known of jobs: the ledger and its locks, SLURM's answers, progress files, the copy of the code."""
