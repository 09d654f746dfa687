"""LoRA adapters beside a model that runs in torch: many of them in one forward."""
