"""Kinds of servers: their URLs, TLS, clients, and what their refusals mean."""
