"""Training a VQ model on images: what muse-train-vq is made of."""
