"""Films and annotations to shards, and what was found on the way."""
