"""Settings: their schema, where they come from, and Celery's names for them."""
