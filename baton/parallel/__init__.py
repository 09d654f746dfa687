"""Tensor parallel: the ranks of one worker, each with its part of every large matrix."""
