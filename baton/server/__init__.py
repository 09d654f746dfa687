"""The HTTP server: OpenAI's API over a running cluster, and the page that shows it."""
