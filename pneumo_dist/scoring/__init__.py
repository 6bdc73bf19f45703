"""Scores of stored predictions; numpy only, no torch."""
