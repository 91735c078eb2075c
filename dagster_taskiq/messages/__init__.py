"""What travels between runs and workers, and how it is trusted."""
