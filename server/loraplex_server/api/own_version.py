"""The version that the API tells."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str | None:
    """Our own version; None when the package runs without being installed."""
    try:
        return version("loraplex")
    except PackageNotFoundError:
        return None
