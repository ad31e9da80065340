"""Which adapter is in which memory tier."""
