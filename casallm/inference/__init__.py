"""Text out of a model: sampling and the cached engine."""
