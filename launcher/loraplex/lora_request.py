"""`LoRARequest`: the adapter that a prompt asks for, as vLLM's users write it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter's name, its number and its files: a local folder or a hub id (`org/name`, `org/name@revision`).

    The number is taken as vLLM takes it and has no meaning here: what counts is the content of the files.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if not self.lora_name:
            raise ValueError("lora_name must not be empty")
        if self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be at least 1, is {self.lora_int_id}")
        if not self.lora_path:
            raise ValueError("lora_path must not be empty")

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The adapter's number."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """The adapter's files."""
        return self.lora_path
