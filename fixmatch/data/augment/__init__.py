"""Random views of images: what is drawn at random, and what that does to the pixels."""
