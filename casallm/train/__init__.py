"""The one training loop and everything it needs to survive."""
