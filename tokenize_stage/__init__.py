"""Stage one: images in, token store out; also the VQ models and their trainer."""
