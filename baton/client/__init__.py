"""Clients of a router: submit requests and follow each to its outcome."""
