"""`loraplex adapters check`: whether an adapter can be served on a base model, and what it is; no server is started."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplex.flags import Settings
from loraplex.launch_error import LaunchError
from loraplex_models.adapters.finite import check_finite
from loraplex_models.adapters.manifest import AdapterManifest, ManifestError, check_adapter
from loraplex_models.config import ModelConfig, ModelConfigError, read_config
from loraplex_server.adapter_store import MIB, AdapterStore
from loraplex_server.pickled_adapters import is_pickled, unpickled

WHAT_KIND = {
    "adapter_invalid": "its files are broken",
    "adapter_incompatible": "it was made for another base model",
    "adapter_unsupported": "it needs what is not served",
    "adapter_too_large": "it is above a limit of this server",
}


def check(place: str, settings: Settings, hub_access: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the adapter at `place` (a folder or a hub id) fits, and lines that say why or what it is.

    Raises LaunchError when the base model or the adapter cannot be had.
    """
    # Brings huggingface_hub, which takes a good part of a second.
    from loraplex_models.sources import AdapterItem, SourceError, resolve_adapter, resolve_model

    launch = settings.launch
    wanted = launch.weights_cache_override or launch.model_id or ""
    name = launch.served_model_name or launch.model_id or wanted
    try:
        model = read_config(resolve_model(wanted, launch.revision, weights=False, **hub_access, progress=False).path)
    except (SourceError, ModelConfigError) as error:
        raise LaunchError(f"model '{wanted}': {error}") from None
    repo, _, revision = place.partition("@")
    is_local = Path(place).expanduser().is_dir()
    item = AdapterItem(place, place if is_local else repo, None if is_local else revision or None, is_local)
    try:
        folder = Path(resolve_adapter(item, **hub_access, progress=False).path)
    except SourceError as error:
        raise LaunchError(f"adapter '{place}': {error}") from None
    try:
        manifest = _manifest(folder, model, settings, name)
    except ManifestError as error:
        return False, [f"no: '{place}' cannot be served on '{name}': {WHAT_KIND[error.error_type]}", f"  {error}"]
    return True, [f"yes: '{place}' can be served on '{name}'", *_description(manifest)]


def _manifest(folder: Path, model: ModelConfig, settings: Settings, base_model_name: str) -> AdapterManifest:
    sources = settings.serve.adapter_sources
    with tempfile.TemporaryDirectory() as temporary:
        if sources.trust_pickle_adapters and is_pickled(folder):
            store = AdapterStore(Path(temporary), sources.max_adapter_mb * MIB)
            folder = unpickled(folder, store, sources.adapter_fetch_timeout)
        manifest = check_adapter(
            folder,
            model,
            max_rank=settings.serve.engine.adapters.max_lora_rank,
            max_bytes=sources.max_adapter_mb * MIB,
            base_model_name=base_model_name,
        )
        check_finite(folder)
    return manifest


def _description(manifest: AdapterManifest) -> list[str]:
    entries = manifest.modules.values()
    lines = [f"rank      {_range(entry.rank for entry in entries)}"] if entries else []
    if entries:
        layers = {module.split(".")[1] for module in manifest.modules}
        kinds = ", ".join(manifest.target_modules)
        lines += [
            f"scaling   {_range(entry.scaling for entry in entries)} (alpha {manifest.alpha:g})",
            f"modules   {kinds}: {len(manifest.modules)} linears in {len(layers)} layers",
            f"stored as {', '.join(sorted({entry.dtype for entry in entries}))}",
        ]
    extras = _extras(manifest)
    if extras:
        lines.append(f"also      {', '.join(extras)}")
    lines += [f"size      {manifest.num_bytes:,} bytes", f"digest    {manifest.digest}"]
    lines += [f"note      {warning}" for warning in manifest.warnings]
    return [f"  {line}" for line in lines]


def _extras(manifest: AdapterManifest) -> list[str]:
    entries = manifest.modules.values()
    invocation = manifest.invocation_token_ids
    found = {
        "DoRA": any(entry.magnitude_name for entry in entries),
        "biases of B": any(entry.b_bias_name for entry in entries),
        f"biases of {len(manifest.biases)} linears": bool(manifest.biases),
        "the embedding": manifest.embedding is not None,
        "the output head": manifest.head is not None,
        f"acts from its invocation tokens {list(invocation)} on": bool(invocation),
    }
    return [name for name, is_there in found.items() if is_there]


def _range(values: Iterable[float]) -> str:
    every = sorted(set(values))
    return f"{every[0]:g}" if len(every) == 1 else f"{every[0]:g} to {every[-1]:g}"
