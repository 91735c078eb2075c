"""The worker process and its parts; ``worker`` puts them together."""
