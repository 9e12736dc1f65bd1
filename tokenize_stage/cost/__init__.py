"""What encoding a data set will cost: measured stages, computed bounds, and what follows."""
