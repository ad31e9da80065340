"""A folder with a random model, its byte tokenizer, a chat template and adapters: what `LLM` is tested on."""

import json
from pathlib import Path

from tiny_models import make_peft_adapter, make_tiny_llama
from tiny_tokenizer import byte_tokenizer
from transformers import LlamaForCausalLM

ADAPTERS = ("red", "blue")
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>me:{% endif %}"
)


def make_tiny_world(folder: Path) -> LlamaForCausalLM:
    """Write `base`, and an adapter a name in ADAPTERS; token ids 0 to 2 are <pad>, <s> and the end token </s>."""
    tokenizer = byte_tokenizer()
    model = make_tiny_llama(folder / "base", vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    for seed, name in enumerate(ADAPTERS):
        make_peft_adapter(folder / name, model, rank=4 + 4 * seed, seed=seed)
    return model
