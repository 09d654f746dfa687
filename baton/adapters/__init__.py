"""LoRA adapters as peft writes them: folders, their configuration, which linears they name. No torch."""
