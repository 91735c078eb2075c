"""Executes a step or a run, and writes its events; child, run and eager mode share it."""
