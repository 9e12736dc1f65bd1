"""Step 2, pixels: the bytes of an image -> square uint8 pictures."""
