"""How the nine steps overlap: read, decode, encode, write, at the same time."""
