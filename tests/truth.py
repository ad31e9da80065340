"""What transformers and peft say: the independent truth that engine answers are held against."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
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
        if adapter is not None:
            self._model.set_adapter(adapter)
        is_base = adapter is None and isinstance(self._model, PeftModel)
        with self._model.disable_adapter() if is_base else nullcontext():
            logits = self._model(torch.tensor([token_ids])).logits[0]
        return logits.float().log_softmax(-1)

    def objection(self, adapter: str | None, prompt: list[int], answer: Answer, end_token_ids: set[int]) -> str | None:
        """Why `answer` is not the greedy answer of that adapter alone; None when it is, token for token.

        Holding each token against the model's choice after the same tokens is the same as generating anew.
        """
        logprobs = self.logprobs(adapter, prompt + answer.token_ids)
        for index, (token_id, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            scores = logprobs[len(prompt) - 1 + index]
            best = int(scores.argmax())
            if token_id != best:
                return f"token {index} is {token_id}, the greedy one is {best}"
            if abs(float(scores[best]) - logprob) > TOLERANCE:
                return f"token {index} has log-probability {logprob}, {float(scores[best])} is right"
            if token_id in end_token_ids and index + 1 < len(answer.token_ids):
                return f"token {index} is an end token, and more follow"
        ended = bool(answer.token_ids) and answer.token_ids[-1] in end_token_ids
        if answer.finish_reason == "eos_token" and not ended:
            return "it ends as eos_token without one"
        return None
