"""loraplex: one base model, thousands of LoRA adapters, one batch."""
