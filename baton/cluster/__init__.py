"""The processes of a cluster on one machine: start, restart and stop them."""
