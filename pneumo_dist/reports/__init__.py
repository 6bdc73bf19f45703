"""Presentation of results: HTML pages, plots, pictures, TensorBoard. Computes no scores."""
