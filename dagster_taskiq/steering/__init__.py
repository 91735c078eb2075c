"""Steering workers, queues and tasks from outside: what commands and the web page do.

Each call is given open servers (``helm``) and says what it has done; what asks a user, or writes to
a terminal, is the caller's.
"""
