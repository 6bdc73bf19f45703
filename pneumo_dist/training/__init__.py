"""Training: loss, schedule, checkpoints, the distributed loop, weight averaging."""
