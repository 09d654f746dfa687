"""Planning: the nodes of router and workers on a virtual clock, with step times instead of tensors."""
