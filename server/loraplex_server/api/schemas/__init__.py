"""Request and response bodies, a file a dialect."""
