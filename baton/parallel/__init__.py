"""Tensor parallel: the ranks of one worker, each of which computes with its part of every large matrix."""
