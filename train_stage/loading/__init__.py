"""Step 5: which rows come when, and their codes, classes and texts as batches."""
