"""Flags and environment names, derived from the settings; the only file that reads the environment."""

import dataclasses
import difflib
import ipaddress
import os
import socket
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loraplex.foreign_flags import ALIASES, FOREIGN_SWITCHES, FOREIGN_VARIABLES, IGNORED, NOT_YET
from loraplex_models.s3_access import S3Access
from loraplex_server.config import (
    AdapterConfig,
    AdapterSourceConfig,
    ApiConfig,
    EngineConfig,
    LaunchConfig,
    ServeConfig,
)

GROUPS: tuple[type, ...] = (LaunchConfig, ApiConfig, EngineConfig, AdapterConfig, AdapterSourceConfig)
ENDLESS_ADDRESS = "0.0.0.0"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What flags and environment ask for; nothing is looked up yet."""

    launch: LaunchConfig
    serve: ServeConfig
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class SettingField:
    """One setting as its dataclass declares it."""

    name: str
    flag: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    minimum: int | None

    @property
    def env_name(self) -> str:
        """The environment variable of the same meaning."""
        return self.name.upper()


def setting_fields(group: type) -> Iterator[SettingField]:
    """The settings of one config dataclass, in their order; fields that the launcher fills are not among them."""
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if "help" not in field.metadata:
            continue
        kinds = typing.get_args(hints[field.name]) if _is_union(hints[field.name]) else (hints[field.name],)
        kind = next(kind for kind in kinds if kind is not type(None))
        yield SettingField(
            name=field.name,
            flag=field.metadata["flag"] or "--" + field.name.replace("_", "-"),
            kind=typing.get_origin(kind) or kind,
            optional=type(None) in kinds,
            default=field.default,
            help=field.metadata["help"],
            choices=field.metadata["choices"],
            minimum=field.metadata["minimum"],
        )


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType)


class _TextItems(click.types.StringParamType):
    """Repeatable text whose environment variable is one item, or a list with commas."""

    def __init__(self, separator: str | None):
        self._separator = separator

    def split_envvar_value(self, rv: str) -> list[str]:
        return rv.split(self._separator) if self._separator else [rv]


class _SettingOption(click.Option):
    """An option that also knows a platform's name for its variable, and passes over what Kubernetes puts into the
    environment: NAME_PORT=tcp://…
    """

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        if value is None and (name := FOREIGN_VARIABLES.get(self.name or "")):
            return os.environ.get(name) or None
        if value is not None and value.startswith("tcp://"):
            _warn(ctx, f"{self.envvar}={value} is ignored: it is not a value but the address of a Kubernetes service")
            return None
        return value


def variable_of(option: click.Parameter) -> str:
    """The environment variable that an option was read from."""
    own = str(option.envvar)
    return own if own in os.environ else FOREIGN_VARIABLES.get(option.name or "", own)


def _warn(context: click.Context, message: str) -> None:
    warnings: list[str] = context.meta.setdefault("loraplex.warnings", [])
    if message not in warnings:
        warnings.append(message)


def _option(field: SettingField) -> click.Option:
    spellings = [field.name, field.flag, *ALIASES.get(field.name, ())]
    common: dict[str, Any] = {"default": field.default, "envvar": field.env_name, "help": field.help}
    value_type: click.ParamType[Any]
    if field.kind is tuple:
        # A key may hold any character, so API_KEY is one key.
        value_type = _TextItems(None if field.name == "api_key" else ",")
        return _SettingOption(spellings, type=value_type, multiple=True, **common)
    if field.kind is bool and not field.optional:
        spellings[1] += f"/--no-{field.flag[2:]}" if field.default else ""
        return _SettingOption(spellings, is_flag=True, **common)
    if field.choices:
        value_type = click.Choice(field.choices)
    elif field.kind is int:
        value_type = click.IntRange(min=field.minimum, max=65535 if field.name == "port" else None)
    elif field.kind is float:
        value_type = click.FLOAT
    else:
        value_type = click.BOOL if field.kind is bool else click.STRING
    return _SettingOption(spellings, type=value_type, show_default=not field.optional, **common)


def options() -> list[click.Parameter]:
    """Every flag of `serve`: the settings, their other names, and the flags that have no effect."""
    result: list[click.Parameter] = [_option(field) for group in GROUPS for field in setting_fields(group)]
    result.append(
        _SettingOption(
            ["--max-input-length"],
            type=click.IntRange(min=1),
            envvar="MAX_INPUT_LENGTH",
            help="old name of --max-input-tokens",
        )
    )
    for ignored in IGNORED:
        name = ignored.flag[2:].replace("-", "_")
        variable = name.upper() if ignored.is_read else None
        kind: dict[str, Any] = {} if ignored.takes_value else {"is_flag": True}
        result.append(
            _SettingOption([ignored.flag], envvar=variable, help=f"no effect: {ignored.reason}", hidden=True, **kind)
        )
    return result


def _was_given(context: click.Context, name: str) -> bool:
    given = context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return given and context.params[name] not in (None, False, ())


def _hostname(context: click.Context, hostname: str) -> str:
    """An address to bind to; a name, which in a container is the container's, gives way to all addresses."""
    if hostname == "localhost":
        return "127.0.0.1"
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        if hostname != socket.gethostname():  # as every container has it in HOSTNAME
            _warn(context, f"hostname '{hostname}' is not an IP address: listening on {ENDLESS_ADDRESS}")
        return ENDLESS_ADDRESS
    return hostname


def _check_limits(context: click.Context) -> None:
    """Refuse limits that contradict each other, as TGI's launcher does."""
    values = context.params
    longest, total = values["max_input_tokens"], values["max_total_tokens"]
    if longest and total and longest >= total:
        raise click.UsageError(f"--max-input-tokens ({longest}) must be less than --max-total-tokens ({total})")
    batch_total = values["max_batch_total_tokens"]
    if batch_total and total and batch_total < total:
        raise click.UsageError(
            f"--max-batch-total-tokens ({batch_total}) must be at least --max-total-tokens ({total}): "
            "one request must fit"
        )
    if values["sharded"] and _was_given(context, "num_shard") and values["num_shard"] <= 1:
        raise click.UsageError("--sharded true needs --num-shard of 2 or more")
    if values["ngrok"] and not (values["ngrok_authtoken"] and values["ngrok_edge"]):
        raise click.UsageError("--ngrok needs --ngrok-authtoken and --ngrok-edge")


def _warn_of_near_misses(context: click.Context, known: set[str]) -> None:
    """A variable that is almost one of ours was probably meant to be it; short names are alike by chance."""
    candidates = [name for name in known if len(name) >= 8 and "_" in name]
    for name in os.environ.keys() - known:
        if "_" in name and (near := difflib.get_close_matches(name, candidates, n=1, cutoff=0.92)):
            _warn(context, f"the environment variable {name} is not known here; {near[0]} is")


def settings_from(context: click.Context) -> Settings:
    """The settings of a parsed command line; raises click.UsageError where they contradict each other."""
    values = dict(context.params)
    for ignored in IGNORED:
        if _was_given(context, ignored.flag[2:].replace("-", "_")):
            _warn(context, f"{ignored.flag} has no effect: {ignored.reason}")
    for name, reason in NOT_YET.items():
        if _was_given(context, name):
            _warn(context, f"--{name.replace('_', '-')} has no effect: {reason}")
    if values["max_input_length"]:
        if _was_given(context, "max_input_tokens"):
            raise click.UsageError("--max-input-length is the old name of --max-input-tokens: give one of them")
        values["max_input_tokens"] = context.params["max_input_tokens"] = values["max_input_length"]
    _check_limits(context)
    known = {parameter.envvar for parameter in context.command.params if isinstance(parameter.envvar, str)}
    _warn_of_near_misses(context, known)
    values["hostname"] = _hostname(context, values["hostname"])
    values |= hub_environment(values["huggingface_hub_cache"])
    for name, foreign_variable in FOREIGN_SWITCHES.items():
        values[name] = values[name] or _is_on(foreign_variable)
    if not values["api_key"] and (key := _first_set("VLLM_API_KEY")):
        # Left unread it would leave a server open that its operator believes to be closed.
        values["api_key"] = (key,)
    if values["adapter_state"] and values["adapter_cache"]:
        raise click.UsageError("--adapter-state holds the files too: leave --adapter-cache out")
    values["adapter_cache"] = (
        values["adapter_state"] or values["adapter_cache"] or str(user_cache_folder() / "loraplex" / "adapters")
    )

    def build(group: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in setting_fields(group)}

    hub = {name: values[name] for name in ("hub_token", "hub_endpoint", "hub_offline")}
    return Settings(
        launch=LaunchConfig(**build(LaunchConfig), **hub),
        serve=ServeConfig(
            api=ApiConfig(**build(ApiConfig)),
            engine=EngineConfig(**build(EngineConfig), adapters=AdapterConfig(**build(AdapterConfig))),
            adapter_sources=AdapterSourceConfig(**build(AdapterSourceConfig), **hub, **s3_environment()),
        ),
        warnings=tuple(context.meta.get("loraplex.warnings", ())),
    )


def _first_set(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def hub_environment(cache: str | None) -> dict[str, Any]:
    """What the hub's own variables say: HF_TOKEN, HF_ENDPOINT, HF_HOME and so on."""
    home = _first_set("HF_HOME")
    return {
        "huggingface_hub_cache": cache or _first_set("HF_HUB_CACHE") or (str(Path(home, "hub")) if home else None),
        "hub_token": _first_set("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"),
        "hub_endpoint": _first_set("HF_ENDPOINT"),
        "hub_offline": _is_on("HF_HUB_OFFLINE"),
    }


def s3_environment() -> dict[str, Any]:
    """What the variables of AWS, and of LoRAX for its sources, say."""
    account = _first_set("R2_ACCOUNT_ID")
    bucket, folder = _first_set("PREDIBASE_MODEL_BUCKET") or "", _first_set("PREDIBASE_MODEL_FOLDER") or ""
    access = S3Access(
        endpoint=_first_set("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        or (f"https://{account}.r2.cloudflarestorage.com" if account else None),
        region=_first_set("AWS_REGION", "AWS_DEFAULT_REGION") or ("auto" if account else "us-east-1"),
        access_key=_first_set("AWS_ACCESS_KEY_ID"),
        secret_key=_first_set("AWS_SECRET_ACCESS_KEY"),
        session_token=_first_set("AWS_SESSION_TOKEN"),
    )
    return {
        "s3": access,
        "s3_folder": "/".join(part.strip("/") for part in (bucket, folder) if bucket and part),
        "predibase_gateway": _first_set("PREDIBASE_GATEWAY_ENDPOINT"),
    }


def openmp_variables() -> frozenset[str]:
    """The names of the OpenMP variables that the user has set; they win."""
    return frozenset(name for name in os.environ if name.startswith(("OMP_", "GOMP_")))


def user_cache_folder() -> Path:
    """Where this user's caches lie (XDG)."""
    return Path(_first_set("XDG_CACHE_HOME") or Path.home() / ".cache")
