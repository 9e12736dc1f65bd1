"""The parts of `make demo` and `make demo-text`: their data and their pictures."""
