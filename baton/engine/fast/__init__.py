"""Accelerations, each with a slow sibling that it is tested against. The engine runs without this folder."""
