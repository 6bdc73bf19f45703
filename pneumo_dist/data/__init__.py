"""Films, annotations, shards and batches, up to the tensors of a rank."""
