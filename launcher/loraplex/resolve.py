"""Find the base model and the adapters, download what is not here, and check each before anything is started."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

from loraplex.flags import Settings
from loraplex.launch_error import LaunchError
from loraplex.plan import CheckpointFacts
from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.config import ModelConfig, ModelConfigError, read_config
from loraplex_server.adapter_spec import adapter_spec
from loraplex_server.config import ApiConfig, LaunchConfig
from loraplex_server.messages import AdapterSpec


def check_address(api: ApiConfig) -> None:
    """Refuse an address that cannot be bound, before anything is downloaded."""
    family = socket.AF_INET6 if ":" in api.hostname else socket.AF_INET
    address = f"{api.hostname}:{api.port}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((api.hostname, api.port))
            probe.listen(1)
        except OSError as error:
            causes = {
                errno.EADDRINUSE: "the port is in use: stop what listens there or choose another --port",
                errno.EACCES: "the port is not permitted: choose a --port above 1023",
                errno.EADDRNOTAVAIL: "this machine does not have that address: choose another --hostname",
            }
            cause = causes.get(error.errno or 0, os.strerror(error.errno or 0))
            raise LaunchError(f"cannot listen on {address}: {cause}") from None


def check_state(settings: Settings) -> None:
    """Refuse a folder for the names of adapters that cannot be used, before anything is downloaded."""
    folder = settings.serve.adapter_sources.adapter_state
    if folder is None or settings.launch.node_rank:  # the API process of machine 0 uses it
        return
    from loraplex_server.adapter_state import AdapterState, AdapterStateError  # as in `resolve`

    state = AdapterState(Path(folder))
    try:
        state.open()
    except AdapterStateError as error:
        raise LaunchError(str(error)) from None
    state.close()


def resolve(settings: Settings, *, progress: bool = False) -> CheckpointFacts:
    """The base model and every adapter as checked local files; with `progress`, bars show each download.

    Raises LaunchError; one for all adapters that are refused, with each one's reason.
    """
    # Brings huggingface_hub, which takes a good part of a second; a wrong flag or a port in use is told before.
    from loraplex_models.sources import SourceError, resolve_model

    launch = settings.launch
    wanted = launch.weights_cache_override or launch.model_id or ""
    try:
        source = resolve_model(wanted, launch.revision, **hub_access(launch), progress=progress)
        config = read_config(source.path)
    except (SourceError, ModelConfigError) as error:
        raise LaunchError(f"model '{wanted}': {error}") from None
    weights = list(Path(source.path).glob("*.safetensors"))
    if not weights:
        raise LaunchError(f"model '{wanted}' has no *.safetensors files in {source.path}: other formats are not read")
    model_id = launch.model_id or wanted
    if source.source == "hub":
        model_id = model_id.partition("@")[0]
    adapters = _resolve_adapters(settings, config, progress=progress)
    return CheckpointFacts(
        path=source.path,
        model_id=launch.served_model_name or model_id,
        revision=source.revision,
        config=config,
        weight_bytes=sum(file.stat().st_size for file in weights),
        adapters=tuple(spec for spec, _ in adapters),
        notes=tuple(f"adapter '{spec.adapter_id}': {warning}" for spec, warnings in adapters for warning in warnings),
    )


def hub_access(launch: LaunchConfig) -> dict[str, Any]:
    """How the hub is reached, as the functions of `sources` take it."""
    return {
        "cache_dir": launch.huggingface_hub_cache,
        "token": launch.hub_token,
        "endpoint": launch.hub_endpoint,
        "offline": launch.hub_offline,
    }


def _resolve_adapters(
    settings: Settings, config: ModelConfig, *, progress: bool
) -> list[tuple[AdapterSpec, list[str]]]:
    """Every adapter, with what a person should know about it. Raises LaunchError."""
    from loraplex_models.sources import SourceError, parse_lora_adapters, resolve_adapter  # as above

    launch = settings.launch
    try:
        items = parse_lora_adapters(",".join(launch.lora_adapters))
        if settings.serve.adapter_sources.adapter_list:
            _check_list(settings.serve.adapter_sources.adapter_list, {item.adapter_id for item in items})
    except SourceError as error:
        raise LaunchError(f"adapters: {error}") from None
    adapters: list[tuple[AdapterSpec, list[str]]] = []
    refused: list[str] = []
    for item in items:
        try:
            source = resolve_adapter(item, **hub_access(launch), progress=progress)
            folder = _without_pickles(settings, source.path)
            manifest = check_adapter(
                folder,
                config,
                max_rank=settings.serve.engine.adapters.max_lora_rank,
                max_bytes=settings.serve.adapter_sources.max_adapter_mb * 2**20,
                base_model_name=launch.served_model_name or launch.model_id,
            )
        except (SourceError, ManifestError) as error:
            refused.append(f"adapter '{item.adapter_id}': {error}")
            continue
        spec = adapter_spec(item.adapter_id, folder, manifest, source=source.source, revision=source.revision)
        adapters.append((spec, manifest.warnings))
    if refused:
        raise LaunchError("; ".join(refused))
    return adapters


def _check_list(path: str, names: set[str]) -> None:
    """Have a mistake in the list of adapters, or a name that is taken, end the start. Raises SourceError."""
    from loraplex_models.sources import SourceFormatError, read_adapter_list  # as above
    from loraplex_server.api.schemas.listed_merges import listed_merges

    items, lines = read_adapter_list(path)
    for name in [item.adapter_id for item in items] + [name for name, _ in listed_merges(lines)]:
        if name in names:
            raise SourceFormatError(f"adapter '{name}' is given twice: give each a name of its own")
        names.add(name)


def _without_pickles(settings: Settings, folder: str) -> str:
    """The adapter's folder, or where it lies converted if the operator trusts its pickle. Raises ManifestError."""
    from loraplex_server.adapter_store import MIB, AdapterStore  # as above
    from loraplex_server.pickled_adapters import is_pickled, unpickled

    sources = settings.serve.adapter_sources
    if not (sources.trust_pickle_adapters and is_pickled(Path(folder))):
        return folder
    store = AdapterStore(Path(sources.adapter_cache), sources.adapter_cache_mb * MIB)
    try:
        store.prepare()
        return str(unpickled(Path(folder), store, sources.adapter_fetch_timeout))
    except OSError as error:
        raise LaunchError(f"{sources.adapter_cache}: {error.strerror}; choose another --adapter-cache") from None
