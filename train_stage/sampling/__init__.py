"""Step 8: codes from a condition, by parallel decoding."""
