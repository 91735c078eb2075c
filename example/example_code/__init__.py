"""The code location of the example."""
