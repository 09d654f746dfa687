"""Whether NIXL is installed here: an optional dependency, with an environment of its own."""

import importlib.util

NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
WITHOUT_NIXL = "NIXL is not installed; `make test-nixl` runs this with it"
