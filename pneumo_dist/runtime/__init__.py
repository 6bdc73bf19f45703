"""What every stage stands on: files, tasks, signals, ranks, logs. No torch at import time but in ranks' functions."""
