"""From model weights to the mask of one film. Knows no files of a run."""
