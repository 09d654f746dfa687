"""KV bookkeeping in plain integers: shapes, blocks, grants. No torch: the router reads it too."""
