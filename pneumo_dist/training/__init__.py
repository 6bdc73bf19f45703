"""Training: loss, schedule, checkpoints, the distributed loop and weight averaging."""
