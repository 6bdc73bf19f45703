"""The base of every stage: files, tasks, signals, ranks, logs. No module imports torch at its top level."""
