"""From films and annotations to shards, with an audit of both."""
