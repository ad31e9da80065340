"""Adapters that bring more than products, through the whole engine: loaded, evicted and loaded again beside others."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any

from engines import EngineBench
from tiny_models import SEVEN_LINEARS, make_peft_adapter, make_tiny_llama
from truth import Truth

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "both ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": [7, 12]},
    "biases": {"bias": "all", "lora_bias": True},
    "activated": {"alora_invocation_tokens": [401], "target_modules": ["q_proj", "v_proj"]},
}


def test_every_answer_is_its_adapters_own_while_slots_change_hands(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", attention_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft saves embeddings too, and says so
        adapters = {
            name: make_peft_adapter(
                tmp_path / str(seed), copy.deepcopy(model), seed=seed, **({"target_modules": SEVEN_LINEARS} | fields)
            )
            for seed, (name, fields) in enumerate(FEATURES.items())
        }
    bench = EngineBench(tmp_path / "model", adapters)
    bench.start(max_resident_adapters=2, num_kv_blocks=128)
    draw = random.Random(1)
    requests: dict[str, tuple[list[int], str | None]] = {}
    for number in range(40):
        prompt = [7, 12, *(draw.randrange(3, 400) for _ in range(draw.choice((2, 9, 25))))]
        if draw.random() < 0.5:
            prompt[len(prompt) // 2] = 401
        requests[str(number)] = prompt, draw.choice([None, *adapters])
        bench.add(str(number), *requests[str(number)], max_new_tokens=5, ignore_eos=True)
        for _ in range(draw.choice((0, 1, 6))):
            bench.step()
    bench.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns where an invocation does not occur
        # One model for each: peft cannot hold them in one, a copied head and a low-rank one for example.
        truths: dict[str | None, Truth] = {
            name: Truth(copy.deepcopy(model), {name: folder}) for name, folder in adapters.items()
        }
        truths[None] = Truth(model, {})
        objections = {
            f"{name} ({adapter})": objection
            for name, (prompt, adapter) in requests.items()
            if (objection := truths[adapter].objection(adapter, prompt, bench.answer(name), set()))
        }
    assert not objections
    manager = bench.engine.adapters
    assert manager.num_pins == 0 and len(manager.resident_ids()) <= 2 < len(
        {adapter for _, adapter in requests.values()}
    )
    for spec in bench.specs.values():
        bench.engine.unload_adapter(spec.digest)
    bench.run()
    assert (manager.device.used_bytes, manager.host.used_bytes) == (0, 0)
