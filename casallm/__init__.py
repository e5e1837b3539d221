"""Train your own language model in the cloud, know beforehand what it costs, talk to it."""

__version__ = "0.1.0"
