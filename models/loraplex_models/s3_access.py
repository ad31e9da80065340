"""`S3Access`: how objects in S3 are reached; free of what reads them, for the configuration."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class S3Access:
    """Where the objects are and the keys to them; without keys requests are not signed."""

    endpoint: str | None = None  # absent: Amazon's of the region
    region: str = "us-east-1"
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """The endpoint's address."""
        return (self.endpoint or f"https://s3.{self.region}.amazonaws.com").rstrip("/")
