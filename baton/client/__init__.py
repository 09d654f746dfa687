"""Clients of a router, blocking and asyncio, over one RequestTracker; and a client of the HTTP server."""
