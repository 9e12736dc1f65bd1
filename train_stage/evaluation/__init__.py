"""What generated pictures are measured with."""
