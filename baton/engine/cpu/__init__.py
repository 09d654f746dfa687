"""Accelerations, each beside a slow sibling that it is tested against."""
