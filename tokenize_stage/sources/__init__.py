"""Step 1, image: where samples come from, as input shards."""
