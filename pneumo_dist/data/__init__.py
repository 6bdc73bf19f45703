"""Films, annotations, shards and batches: everything up to the tensors a rank receives."""
