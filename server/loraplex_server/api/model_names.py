"""Which model a request of the OpenAI routes means: the base or an adapter."""

from loraplex_server.api.job import NO_ACCESS, AdapterAccess
from loraplex_server.api.state import ApiState
from loraplex_server.errors import AdapterNotFound, InvalidRequest

# Names that clients send when nobody chose one.
PLACEHOLDERS = ("", "tgi", "dummy")


def adapter_of(
    state: ApiState, model: str | None, adapter_id: str | None, access: AdapterAccess = NO_ACCESS
) -> str | None:
    """The adapter that `model` and `adapter_id` name together; None is the base.

    Raises AdapterNotFound for a name that is neither, and that could not be fetched: the base never answers in an
    adapter's place.
    """
    named = _adapter_named(state, model)
    if named is None:
        named = adapter_id or None
    elif adapter_id and adapter_id != named:
        raise InvalidRequest(f"`model` names the adapter {named[:200]!r}, and `adapter_id` another")
    if named is None:
        return None
    try:
        state.adapters.check_name(named, access)
    except (AdapterNotFound, InvalidRequest) as error:
        raise AdapterNotFound(f"the model {named[:200]!r} does not exist: {error}") from None
    return named


def _adapter_named(state: ApiState, model: str | None) -> str | None:
    base = state.config.api.model_id
    # Some clients send the address they were given.
    if model is None or model in PLACEHOLDERS or model == base or model.startswith(("http://", "https://")):
        return None
    return model.removeprefix(f"{base}:")
