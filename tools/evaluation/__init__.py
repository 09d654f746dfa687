"""Evaluation: how good a model is, asked through the engine that serves it, or through the server."""
