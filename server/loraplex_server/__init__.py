"""The HTTP API, the link between the processes, and the engine."""
