"""Messages between processes, and the one loop that carries them."""
