"""Adapters as files, as weights and as device slots."""
