"""Configuration: YAML recipes (one folder a command) and the loader that checks them.

`configs.load.load_config(schema, argv)` is the only code here; it imports nothing of ours.
"""
