"""Steps 6 and 7: what is hidden, and the losses of predicting it."""
