"""The command line: reads options and calls the part that does the work."""
