"""The version of this package, and nothing else, so that the build reads it without importing."""

__version__ = "0.1.0"
