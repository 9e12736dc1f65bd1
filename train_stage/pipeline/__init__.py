"""Steps 8 and 9 in one object: prompts or classes -> pictures."""
