"""Small tools of a process: its event loops and threads, renewals, its files and its copies."""
