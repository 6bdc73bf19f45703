"""Validation of a fold: scores, notes on films, and the report."""
