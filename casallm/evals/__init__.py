"""Scores: what a model, or something much simpler than a model, makes of text."""
