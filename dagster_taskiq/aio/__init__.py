"""Small tools for event loops, threads and renewals."""
