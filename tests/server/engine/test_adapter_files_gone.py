"""F-ADPT-17: an adapter's files are deleted while it is loaded."""

import shutil
from pathlib import Path

from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama


def test_requests_go_on_from_memory_and_fail_alone_once_the_weights_are_gone_too(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "base")
    adapters = {name: make_peft_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate("ab", 1)}
    bench = EngineBench(tmp_path / "base", adapters)
    bench.add("before", [5, 6, 7], "a")
    bench.run()
    shutil.rmtree(adapters["a"])
    bench.add("from memory", [5, 6, 7], "a")
    bench.run()
    assert bench.answer("from memory") == bench.answer("before")
    bench.start()  # nothing is in memory any more
    for name, adapter in (("gone", "a"), ("other", "b"), ("base", None)):
        bench.add(name, [5, 6, 7], adapter)
    bench.run()
    [output] = bench.outputs["gone"]
    assert output.finish_reason == "error"
    assert output.error is not None and "adapter 'a' could not be loaded" in output.error
    assert str(tmp_path) not in output.error
    assert bench.answer("other").token_ids and bench.answer("base").token_ids
