"""Steps 6 to 8: what guides the model, made of a row's class, text and sizes, or of prompts."""
