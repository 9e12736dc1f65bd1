"""The token store: shards of integers between the two stages, and the model directory.

writer -> STORE/shards/NAME/ -> reader; schema.py says what a store is. Imports nothing of ours.
"""
