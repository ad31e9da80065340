"""Request and answer bodies of TGI's routes, with LoRAX's adapter fields ↔ GenerationJob, TextDelta."""

from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from loraplex_server.adapter_location import parse_source
from loraplex_server.api.job import (
    AdapterAccess,
    AlternativeToken,
    Completion,
    FinishedJob,
    FinishedSequence,
    GenerationJob,
    PromptToken,
    Token,
)
from loraplex_server.api.schemas.merged_adapters import MergedAdapters, wanted_merge
from loraplex_server.api.schemas.structure import format_guide, only_one
from loraplex_server.errors import InvalidRequest

MAX_ADAPTER_ID_LENGTH = 512
MAX_ALTERNATIVES = 20

# TGI's number types. What does not fit one is a type error; bounds with a meaning are checked at admission.
Float32 = Annotated[float, Field(ge=-3.4028235e38, le=3.4028235e38)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
UInt64 = Annotated[int, Field(ge=0, le=2**64 - 1)]


class _Body(BaseModel):
    # Strict: "1" is no number, true is no integer. Unknown fields are ignored, as TGI does.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class GenerateParameters(_Body):
    """How to generate. Every field may be null, which is the same as leaving it out."""

    adapter_id: str | None = Field(None, description="LoRA adapter to answer with; null or empty for the base model")
    adapter_source: str | None = Field(None, description="where an unknown adapter comes from: hub, local, s3 or pbase")
    api_token: str | None = Field(None, description="token for the adapter's source")
    merged_adapters: MergedAdapters | None = Field(None, description="several adapters to answer with as one")
    best_of: UInt64 | None = Field(None, description="sequences to draw; the most likely one is the answer")
    temperature: Float32 | None = Field(
        None, description=">= 0; flattens or sharpens the distribution; 0 takes the most likely tokens", examples=[0.7]
    )
    repetition_penalty: Float32 | None = Field(None, description="> 0; above 1 discourages tokens already seen")
    frequency_penalty: Float32 | None = Field(None, description="-2 to 2; discourages tokens by how often they came")
    presence_penalty: Float32 | None = Field(None, description="-2 to 2; discourages tokens that came at all")
    top_k: Int32 | None = Field(None, description="> 0; draw among the k most likely tokens")
    top_p: Float32 | None = Field(None, description="> 0 and <= 1; draw among the most likely tokens of this mass")
    typical_p: Float32 | None = Field(None, description="> 0 and <= 1; locally typical sampling")
    do_sample: bool | None = Field(None, description="draw tokens instead of taking the most likely ones")
    max_new_tokens: UInt32 | None = Field(None, description="> 0; null for as many as fit", examples=[64])
    return_full_text: bool | None = Field(None, description="put the prompt in front of the generated text")
    stop: list[str] | None = Field(None, description="end when one of these texts was generated; it stays in the text")
    truncate: UInt64 | None = Field(None, description="keep only the last so many tokens of the prompt")
    watermark: bool | None = Field(None, description="bias the draw so that the text can be recognised")
    details: bool | None = Field(None, description="report the tokens and why generation ended")
    decoder_input_details: bool | None = Field(None, description="report the prompt's tokens, where the server allows")
    seed: UInt64 | None = Field(None, description="makes the draw repeatable")
    top_n_tokens: UInt32 | None = Field(None, description="report so many of the likeliest tokens at each place")
    ignore_eos_token: bool | None = Field(None, description="go on after the end token")
    return_k_alternatives: Int32 | None = Field(None, description="1 to 20; LoRAX's form of top_n_tokens: each token "
                                                "names so many of the likeliest in its place")  # fmt: skip
    grammar: dict[str, Any] | None = Field(None, description="what the text must look like: type json, json_schema or "
                                           "regex, and its value",
                                           examples=[{"type": "regex", "value": "(yes|no)"}])  # fmt: skip
    response_format: dict[str, Any] | None = Field(None, description="the same in LoRAX's words: type json_object, "
                                                   "and a schema")  # fmt: skip


class GenerateBody(_Body):
    """The body of /generate and /generate_stream."""

    inputs: str = Field(description="the prompt", examples=["Where is the treasure?"])
    parameters: GenerateParameters | None = None

    def job(self, *, stream: bool) -> GenerationJob:
        """The same without the dialect; refuses what no field of a job stands for."""
        if self.parameters is None:
            return GenerationJob(prompt=self.inputs, stream=stream, do_sample=True)
        asked = self.parameters
        _refuse_unsupported(asked)
        # LoRAX's way: 0 takes the most likely tokens, and then what shapes a draw means nothing; 1 is off.
        is_greedy = asked.temperature == 0
        return GenerationJob(
            prompt=self.inputs,
            adapter_id=asked.adapter_id or None,
            merge=wanted_merge(asked.adapter_id, asked.merged_adapters),
            adapter_access=AdapterAccess(source=asked.adapter_source or None, token=asked.api_token or None),
            stream=stream,
            best_of=asked.best_of,
            max_new_tokens=asked.max_new_tokens,
            do_sample=bool(asked.do_sample) and not is_greedy,
            temperature=None if is_greedy else asked.temperature,
            top_k=None if is_greedy else asked.top_k,
            top_p=None if is_greedy or asked.top_p == 1 else asked.top_p,
            typical_p=None if is_greedy or asked.typical_p == 1 else asked.typical_p,
            repetition_penalty=asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            seed=asked.seed,
            stop=tuple(asked.stop or ()),
            ignore_eos=bool(asked.ignore_eos_token),
            truncate=asked.truncate,
            watermark=bool(asked.watermark),
            top_n_tokens=asked.top_n_tokens,
            num_top_logprobs=asked.return_k_alternatives or 0,
            prompt_logprobs=bool(asked.decoder_input_details),
            guide=only_one(
                "`grammar` and `response_format`",
                [format_guide("grammar", asked.grammar), format_guide("response_format", asked.response_format)],
            ),
        )

    @property
    def wants_details(self) -> bool:
        """Whether the answer has a `details` object."""
        return self.parameters is not None and bool(self.parameters.details or self.parameters.decoder_input_details)

    @property
    def wants_alternatives(self) -> bool:
        """Whether the likeliest tokens are told with each token, LoRAX's way, and not beside them."""
        return self.parameters is not None and self.parameters.return_k_alternatives is not None

    def wants_full_text(self, *, default: bool = False) -> bool:
        """Whether the prompt stands in front of the generated text; `default` is the route's."""
        if self.parameters is None or self.parameters.return_full_text is None:
            return default
        return self.parameters.return_full_text


class CompatGenerateBody(GenerateBody):
    """The body of POST /."""

    stream: bool | None = Field(None, description="answer as /generate_stream instead of with a list")


def _refuse_unsupported(asked: GenerateParameters) -> None:
    if asked.adapter_id is not None and len(asked.adapter_id) > MAX_ADAPTER_ID_LENGTH:
        raise InvalidRequest(
            f"`adapter_id` must have at most {MAX_ADAPTER_ID_LENGTH} characters. Given: {len(asked.adapter_id)}"
        )
    if asked.adapter_source:
        parse_source(asked.adapter_source)
    if asked.return_k_alternatives is not None:
        if not 1 <= asked.return_k_alternatives <= MAX_ALTERNATIVES:
            raise InvalidRequest(
                f"`return_k_alternatives` must be from 1 to {MAX_ALTERNATIVES}. Given: {asked.return_k_alternatives}"
            )
        if asked.top_n_tokens:
            raise InvalidRequest("`return_k_alternatives` and `top_n_tokens` must not both be set")


class BestOfSequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sequence that did not win."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] = []


class Details(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened in a generation."""

    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PromptToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] = []
    top_tokens: list[list[Token]] = []


class GenerateAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer of /generate."""

    generated_text: str
    details: Details | None = None


class StreamDetails(msgspec.Struct, frozen=True):
    """Why a stream ended; the prompt's length goes by TGI's name and by LoRAX's."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int
    prompt_tokens: int


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One token of a stream; the last one has the text, and details if they were asked for."""

    index: int
    token: Token
    top_tokens: list[Token] | msgspec.UnsetType = msgspec.UNSET
    generated_text: str | None
    details: StreamDetails | None


def answer(body: GenerateBody, finished: FinishedJob, *, full_text: bool) -> GenerateAnswer:
    """The answer of a finished job."""
    prefix = body.inputs if full_text else ""
    best = finished.best
    details = None
    if body.wants_details:
        end = best.completion
        details = Details(
            finish_reason=end.finish_reason,
            prompt_tokens=end.num_prompt_tokens,
            generated_tokens=end.num_generated_tokens,
            seed=end.seed,
            prefill=end.prompt_tokens,
            tokens=with_alternatives(best.tokens, best.top_tokens) if body.wants_alternatives else best.tokens,
            best_of_sequences=[_best_of_sequence(other, prefix) for other in finished.others],
            top_tokens=[] if body.wants_alternatives else best.top_tokens,
        )
    return GenerateAnswer(prefix + best.completion.text, details)


def with_alternatives(tokens: list[Token], top_tokens: list[list[Token]]) -> list[Token]:
    """The tokens, each with the likeliest ones in its place."""
    return [
        msgspec.structs.replace(
            token, alternative_tokens=[AlternativeToken(one.id, one.text, one.logprob) for one in top]
        )
        for token, top in zip(tokens, top_tokens, strict=True)
    ]


def _best_of_sequence(sequence: FinishedSequence, prefix: str) -> BestOfSequence:
    end = sequence.completion
    return BestOfSequence(
        generated_text=prefix + end.text,
        finish_reason=end.finish_reason,
        generated_tokens=end.num_generated_tokens,
        seed=end.seed,
        prefill=end.prompt_tokens,
        tokens=sequence.tokens,
        top_tokens=sequence.top_tokens,
    )


def stream_details(end: Completion) -> StreamDetails:
    """The details of a stream's last event."""
    return StreamDetails(
        finish_reason=end.finish_reason,
        generated_tokens=end.num_generated_tokens,
        seed=end.seed,
        input_length=end.num_prompt_tokens,
        prompt_tokens=end.num_prompt_tokens,
    )
