"""Chat templates that adapters bring, where the operator allows them: read once a version, rendered in the sandbox."""

import asyncio
import logging
from collections import OrderedDict

from loraplex_server.errors import TemplateFailed
from loraplex_server.messages import AdapterSpec
from loraplex_server.text.chat_template import ChatTemplate, ChatTemplateError

logger = logging.getLogger(__name__)

MAX_TEMPLATES = 256


class AdapterTemplates:
    """The templates of adapters by the digest of their weights."""

    def __init__(self, base: ChatTemplate | None):
        self._base = base
        self._known: OrderedDict[str, ChatTemplate | None] = OrderedDict()

    async def template_of(self, spec: AdapterSpec) -> ChatTemplate | None:
        """The adapter's own template, or None where its folder has none, or it is a merge. Raises TemplateFailed."""
        if spec.merge is not None:
            return None
        if spec.digest not in self._known:
            try:
                self._known[spec.digest] = await asyncio.to_thread(self._load, spec.path)
            except ChatTemplateError as error:
                logger.warning("adapter %r: %s", spec.adapter_id, error)
                raise TemplateFailed(
                    f"the chat template of adapter {spec.adapter_id!r} cannot be used; the server's log says why"
                ) from None
            if len(self._known) > MAX_TEMPLATES:
                self._known.popitem(last=False)
        return self._known[spec.digest]

    def _load(self, folder: str) -> ChatTemplate | None:
        own = ChatTemplate.load(folder)
        if own is None or self._base is None:
            return own
        # The tokens are the base's; an adapter seldom repeats their names.
        return ChatTemplate(own.source, {**self._base.special_tokens, **own.special_tokens})
