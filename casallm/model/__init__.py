"""The transformer, read top to bottom, and its loss."""
