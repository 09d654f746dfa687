"""The processes of one machine: start them, restart what dies, stop them."""
