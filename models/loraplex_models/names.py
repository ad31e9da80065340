"""The names that families give to their tensors, brought to the ones that all are served under; no torch."""

import re
from collections.abc import Callable

# By architecture: patterns and what stands in their place, in order.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "GPT2LMHeadModel": (
        (r"^(transformer\.)?h\.", "model.layers."),
        (r"^(transformer\.)?wte\b", "model.embed_tokens"),
        (r"^(transformer\.)?wpe\b", "model.embed_positions"),
        (r"^(transformer\.)?ln_f\b", "model.norm"),
        (r"\.attn\.c_attn\b", ".self_attn.qkv_proj"),
        (r"\.attn\.c_proj\b", ".self_attn.o_proj"),
        (r"\.ln_1\b", ".input_layernorm"),
        (r"\.ln_2\b", ".post_attention_layernorm"),
    ),
    "MixtralForCausalLM": ((r"\.block_sparse_moe\b", ".mlp"),),
    "PhiForCausalLM": (
        (r"^model\.final_layernorm\b", "model.norm"),
        (r"\.self_attn\.dense\b", ".self_attn.o_proj"),
        (r"\.mlp\.fc1\b", ".mlp.c_fc"),
        (r"\.mlp\.fc2\b", ".mlp.c_proj"),
    ),
}


def served_names(architecture: str) -> Callable[[str], str]:
    """Return what turns a name of that family, of a tensor or a module, into the served one."""
    renames = [(re.compile(pattern), to) for pattern, to in _RENAMES.get(architecture, ())]

    def served_name(name: str) -> str:
        for pattern, to in renames:
            name = pattern.sub(to, name)
        return name

    return served_name
