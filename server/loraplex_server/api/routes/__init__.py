"""The HTTP routes, a file a dialect."""
