"""What makes the forward fast on a GPU, each way with a slower one to fall back to."""
