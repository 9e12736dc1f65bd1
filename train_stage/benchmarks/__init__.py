"""What `python -m train_stage.bench` measures, and the peers it is measured beside."""
