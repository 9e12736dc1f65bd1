"""How good stored codes are: reconstructions beside their images, in numbers and as a picture."""
