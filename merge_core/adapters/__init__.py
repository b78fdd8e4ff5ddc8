"""LoRA adapters as PEFT saves them, in and out."""
