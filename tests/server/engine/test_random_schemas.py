"""200 random JSON schemas, greedy and sampled, over a real vocabulary: what ends is what its schema describes."""

import json
from pathlib import Path

import jsonschema
import pytest
from engines import EngineBench
from random_schemas import random_schema
from tiny_models import make_tiny_llama
from tokenizers import Tokenizer

from loraplex import demo
from loraplex_server.text.guide_compiler import grammar_of
from loraplex_server.text.guides import schema_guide

NUM_SCHEMAS = 200
# A random model writes numbers without an end; a bounded answer of these schemas is shorter.
MAX_NEW_TOKENS = 220

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("schemas")
    make_tiny_llama(folder, vocab_size=49152, num_hidden_layers=1, hidden_size=32, num_key_value_heads=4)
    (folder / "tokenizer.json").write_bytes((demo.prepare() / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_every_answer_that_ends_parses_and_satisfies_its_schema(folder: Path, do_sample: bool) -> None:
    bench = EngineBench(folder, {})
    bench.start(num_kv_blocks=1024, max_batch_size=64)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for seed in range(NUM_SCHEMAS):
        guide = grammar_of(schema_guide("schema", random_schema(seed)))
        bench.add(
            str(seed), [40 + seed, 41], guide=guide, max_new_tokens=MAX_NEW_TOKENS, do_sample=do_sample, seed=seed
        )
    bench.run()
    num_ended = 0
    for seed in range(NUM_SCHEMAS):
        answer = bench.answer(str(seed))
        if answer.finish_reason != "eos_token":
            assert len(answer.token_ids) == MAX_NEW_TOKENS
            continue
        num_ended += 1
        text = tokenizer.decode(answer.token_ids[:-1], skip_special_tokens=False)
        jsonschema.validate(
            json.loads(text), random_schema(seed), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    assert num_ended >= 0.8 * NUM_SCHEMAS
