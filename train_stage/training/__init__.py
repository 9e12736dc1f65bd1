"""The run around steps 5 to 7: optimizers, averaging, processes, checkpoints, logs."""
