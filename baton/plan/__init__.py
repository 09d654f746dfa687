"""Planning: the router's and the workers' own nodes on a virtual clock, with step times instead of tensors."""
