"""Which class serves which architecture name of a config.json; a class is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING

from loraplex_models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from loraplex_models.decoder import CausalLM


def find_model_class(architecture: str) -> "type[CausalLM] | None":
    """Return the class for an architecture name, or None when it is not served."""
    place = ARCHITECTURES.get(architecture)
    if place is None:
        return None
    model_class: type[CausalLM] = getattr(importlib.import_module(place[0]), place[1])
    return model_class
