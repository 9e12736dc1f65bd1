"""Step 7: the transformers, input_ids and a condition -> logits."""
