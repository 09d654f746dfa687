"""The offline job: prompts in, one file out. A client of the router like any other."""
