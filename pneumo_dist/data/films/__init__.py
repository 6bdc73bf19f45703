"""One film file to pixels, one annotation text to a mask."""
