"""loraplex: one base model, many LoRA adapters, one server."""

__version__ = "0.1.0"
