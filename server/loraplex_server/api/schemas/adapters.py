"""Request and answer bodies of the routes that change and show adapters: vLLM's, SageMaker's, SGLang's and ours."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from loraplex_server.api.schemas.merged_adapters import MergedAdapters
from loraplex_server.errors import InvalidRequest


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class LoadLoraBody(_Body):
    """The body of vLLM's /v1/load_lora_adapter; SGLang's `pinned` too."""

    lora_name: str = Field(description="the name that requests will use", examples=["legal"])
    lora_path: str = Field(description="a folder below --adapter-root, or a hub id", examples=["my-org/legal"])
    load_inplace: bool | None = Field(None, description="replace the adapter if the name is taken")
    base_model_name: Any = Field(None, description="accepted and not used")
    pinned: bool | None = Field(None, description="keep it ready for the model")


class UnloadLoraBody(_Body):
    """The body of vLLM's /v1/unload_lora_adapter."""

    lora_name: str = Field(description="the name to forget", examples=["legal"])
    lora_int_id: Any = Field(None, description="accepted and not used")


class RegisterBody(_Body):
    """The body of POST /adapters: a name, and where its files are to be had or what it is merged of.

    SageMaker's names are taken too.
    """

    name: str = Field(description="the name that requests will use", examples=["legal"])
    source: str | None = Field(None, description="hub, local, s3 or pbase; absent: as `id` looks")
    id: str | None = Field(
        None,
        validation_alias=AliasChoices("id", "src", "adapter_id"),
        description="the adapter at its source: org/name, or a folder below --adapter-root",
        examples=["my-org/legal"],
    )
    merged_adapters: MergedAdapters | None = Field(None, description="in place of `id`: several adapters, as one")
    revision: str | None = Field(None, description="branch, tag or commit at the hub")
    api_token: str | None = Field(None, description="token for the source")
    version: str | None = Field(None, description="name of this version; absent: the next number")
    activate: bool | None = Field(None, description="false adds the version without sending requests to it")
    pin: bool | None = Field(None, description="keep it ready for the model")
    preload: bool | None = Field(None, description="false brings and checks the files on the first use only")

    def check(self) -> None:
        """Refuse fields that contradict each other. Raises InvalidRequest."""
        if (self.id is None) == (self.merged_adapters is None):
            raise InvalidRequest("exactly one of `id` and `merged_adapters` must be set")
        if self.merged_adapters is not None and (self.revision or self.preload is False):
            raise InvalidRequest("`merged_adapters` is made of adapters as they are now: leave `revision` and "
                                 "`preload` out")  # fmt: skip
        if self.preload is False and self.api_token:
            raise InvalidRequest("`api_token` is not kept: leave `preload` out, so that the files are brought now")


class ChangeBody(_Body):
    """The body of PUT /adapters/{name} that changes what requests for the name get."""

    split: dict[str, float] | None = Field(
        None, description="shares of requests by version; one version alone gets them all", examples=[{"1": 9, "2": 1}]
    )
    active: str | None = Field(None, description="the version that gets all requests")
    pinned: bool | None = Field(None, description="keep it ready for the model, or no longer")


class PartInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One of the adapters that a merge was made of, as it was then."""

    id: str
    weight: float
    digest: str | None


class MergeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge was made of, and how."""

    parts: list[PartInfo]
    merge_strategy: str
    density: float
    majority_sign_method: str


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter. `tier`: disk, host or device; null before its files were brought."""

    version: str
    share: float  # of the requests that name no version
    source: str
    id: str
    revision: str | None
    digest: str | None
    rank: int | None
    num_bytes: int | None  # of the tensors in the file
    tier: str | None
    host_bytes: int  # what it takes in host memory now
    device_bytes: int  # what it takes on the device now
    num_requests: int
    error: str | None
    merge: MergeInfo | UnsetType = UNSET


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One name. `last_used`: seconds since 1970, null for never. `dynamic`: it came because a request named it."""

    name: str
    pinned: bool
    dynamic: bool
    last_used: float | None
    error: str | None  # why the last try to replace it failed
    versions: list[VersionInfo]


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /adapters."""

    adapters: list[AdapterInfo]
