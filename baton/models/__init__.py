"""The bundled model, and converters for other checkpoint formats."""
