"""Messages between runs and workers, and how they are trusted."""
