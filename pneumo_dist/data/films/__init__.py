"""Decode one film file to pixels and one annotation text to a mask."""
