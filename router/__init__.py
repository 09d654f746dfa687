"""The router follows every request from Submit to its end. Memory is the workers' concern."""
