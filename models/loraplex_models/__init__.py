"""Model definitions, layers, and adapters as weights."""
