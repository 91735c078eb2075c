"""The server that the package brings, for one machine."""
