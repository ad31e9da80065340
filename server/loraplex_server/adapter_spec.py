"""From a checked manifest to the one type that adapters have on the link."""

from loraplex_models.adapters.manifest import AdapterManifest
from loraplex_server.messages import AdapterSpec


def adapter_spec(
    adapter_id: str, path: str, manifest: AdapterManifest, *, source: str = "local", revision: str | None = None
) -> AdapterSpec:
    """What the engine needs to know of an adapter whose files are at `path`."""
    return AdapterSpec(
        adapter_id=adapter_id,
        path=path,
        digest=manifest.digest,
        rank=manifest.rank,
        num_bytes=manifest.num_bytes,
        source=source,
        revision=revision,
        rank_rows=manifest.rank_rows,
        dense_elements=manifest.dense_elements,
        invocation_token_ids=manifest.invocation_token_ids,
    )
