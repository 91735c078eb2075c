"""The launcher's side: the way of a whole run to a worker."""
