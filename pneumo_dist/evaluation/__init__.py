"""Validation of a fold: scores, film notes and the report."""
