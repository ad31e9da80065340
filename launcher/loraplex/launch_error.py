"""The one exception of the launcher."""


class LaunchError(Exception):
    """The server cannot start; the message is one line for a person: what was found and what to do."""
