"""How results are shown: HTML pages, plots, pictures, TensorBoard. Computes no scores."""
