"""Why an adapter's files are refused."""

from typing import Any, Literal

RefusalType = Literal["adapter_invalid", "adapter_incompatible", "adapter_unsupported", "adapter_too_large"]

MAX_SHOWN_CHARACTERS = 120
# What a person can run; see `convert_adapter`.
CONVERT_COMMAND = "loraplex adapters convert FOLDER NEW_FOLDER"


class ManifestError(Exception):
    """An adapter cannot be served; the message names the finding and the fix.

    `error_type` tells a broken file (adapter_invalid), another base model (adapter_incompatible), a feature that is
    not served (adapter_unsupported) and a size over the limit (adapter_too_large) apart.
    """

    def __init__(self, message: str, error_type: RefusalType = "adapter_invalid"):
        super().__init__(message)
        self.error_type: RefusalType = error_type


def shown(value: Any) -> str:
    """A value from an adapter's file as a message may show it: control characters escaped, never long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"


def shown_names(names: list[str], limit: int) -> str:
    """The first `limit` names of a list, and how many more there are."""
    text = ", ".join(shown(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
