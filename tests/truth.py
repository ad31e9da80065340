"""What transformers and peft say: the independent truth that engine answers are held against."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """What the engine said to one request."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Truth:
    """A transformers model with peft adapters, one at a time; it sees one request alone, without cache or batch."""

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path]):
        self._model = model.eval()
        self._adapter: str | None = ""  # the one that the model has now, which takes peft long to change
        # By adapter and prompt: the longest sequence met, and the likeliest token after each of its tokens with its
        # log-probability. An answer that is the beginning of one met before needs no other pass.
        self._met: dict[tuple[str | None, tuple[int, ...]], tuple[list[int], list[int], list[float]]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft about its own use of transformers
            for name, folder in adapters.items():
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(str(folder), adapter_name=name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name).eval()

    @torch.inference_mode()
    def logprobs(self, adapter: str | None, token_ids: list[int]) -> torch.Tensor:
        """Log-probabilities of every token after each position; [tokens, vocab] float32."""
        self._switch_to(adapter)
        return self._model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)

    def _switch_to(self, adapter: str | None) -> None:
        if adapter == self._adapter or not isinstance(self._model, PeftModel):
            return
        tuner = self._model.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._model.set_adapter(adapter)
        self._adapter = adapter

    def _greedy(self, adapter: str | None, prompt: list[int], answer: list[int]) -> tuple[list[int], list[float]]:
        """The likeliest token at each place of an answer, after the answer's tokens before it; its log-probability."""
        key = adapter, tuple(prompt)
        met, best, highest = self._met.get(key, ([], [], []))
        if not met or met[: len(answer)] != answer:
            top = self.logprobs(adapter, prompt + answer)[len(prompt) - 1 :].max(-1)
            met, best, highest = self._met[key] = answer, top.indices.tolist(), top.values.tolist()
        return best, highest

    def objection(self, adapter: str | None, prompt: list[int], answer: Answer, end_token_ids: set[int]) -> str | None:
        """Why `answer` is not the greedy answer of that adapter alone; None when it is, token for token.

        Holding each token against the model's choice after the same tokens is the same as generating anew.
        """
        best, highest = self._greedy(adapter, prompt, answer.token_ids)
        for index, (token_id, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            if token_id != best[index]:
                return f"token {index} is {token_id}, the greedy one is {best[index]}"
            if abs(highest[index] - logprob) > TOLERANCE:
                return f"token {index} has log-probability {logprob}, {highest[index]} is right"
            if token_id in end_token_ids and index + 1 < len(answer.token_ids):
                return f"token {index} is an end token, and more follow"
        ended = bool(answer.token_ids) and answer.token_ids[-1] in end_token_ids
        if answer.finish_reason == "eos_token" and not ended:
            return "it ends as eos_token without one"
        return None
