"""Batch inference: from a folder of films to predictions, masks, overlays and a worklist."""
