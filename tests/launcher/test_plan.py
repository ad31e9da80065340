from dataclasses import replace
from typing import Any

import pytest

from loraplex.flags import Settings
from loraplex.gpus import Gpus
from loraplex.launch_error import LaunchError
from loraplex.plan import CheckpointFacts, LaunchPlan, check_served, make_plan
from loraplex_models.config import ModelConfig, parse_config
from loraplex_server.config import AdapterConfig, ApiConfig, EngineConfig, LaunchConfig, ServeConfig
from loraplex_server.machine import Machine
from loraplex_server.messages import AdapterSpec

GIB = 1024**3
MACHINE = Machine(num_cores=8, memory_bytes=8 * GIB)
LLAMA = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "dtype": "bfloat16",
    }
)
FACTS = CheckpointFacts(path="/models/m", model_id="m", revision="abc", config=LLAMA, weight_bytes=GIB)


def settings(launch: LaunchConfig | None = None, engine: EngineConfig | None = None) -> Settings:
    serve = ServeConfig(api=ApiConfig(port=3001), engine=engine or EngineConfig())
    return Settings(launch=launch or LaunchConfig(model_id="m"), serve=serve)


def plan(
    engine: EngineConfig | None = None,
    facts: CheckpointFacts = FACTS,
    machine: Machine = MACHINE,
    openmp_set: frozenset[str] = frozenset(),
) -> LaunchPlan:
    return make_plan(settings(engine=engine), facts, machine, openmp_set=openmp_set, gpus=Gpus())


def test_what_was_found_is_handed_to_the_processes() -> None:
    adapter = AdapterSpec(adapter_id="a", path="/a", digest="d", rank=8, num_bytes=100)
    engine = EngineConfig(adapters=AdapterConfig(max_lora_rank=16))
    config = plan(engine, replace(FACTS, adapters=(adapter,))).config
    assert config.engine.model_path == "/models/m"
    assert (config.api.model_id, config.api.model_sha, config.api.port) == ("m", "abc", 3001)
    assert config.engine.adapters.sources == (adapter,)
    assert config.engine.adapters.max_lora_rank == 16


def test_one_api_process_starts_before_one_engine() -> None:
    api, engine = plan().processes
    assert (api.name, engine.name) == ("api", "engine")
    assert (api.rank, engine.rank) == (None, 0)


@pytest.mark.parametrize(("wanted", "resolved"), [("auto", "bfloat16"), ("float32", "float32")])
def test_auto_takes_the_checkpoints_dtype(wanted: str, resolved: str) -> None:
    assert plan(EngineConfig(dtype=wanted)).config.engine.dtype == resolved


@pytest.mark.parametrize(("num_cores", "threads"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_the_engine_computes_on_at_most_four_threads(num_cores: int, threads: int) -> None:
    made = plan(machine=replace(MACHINE, num_cores=num_cores))
    assert made.config.engine.num_threads == threads
    assert made.processes[1].env == {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000"}
    assert made.processes[0].env == {}


def test_a_users_own_openmp_settings_stay_as_they_are() -> None:
    made = plan(openmp_set=frozenset({"OMP_NUM_THREADS"}))
    assert made.processes[1].env == {"GOMP_SPINCOUNT": "2000"}
    assert made.config.engine.num_threads == 0
    for spinning in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert set(plan(openmp_set=frozenset({spinning})).processes[1].env) == {"OMP_NUM_THREADS"}


def test_a_given_number_of_threads_is_taken_in_any_case() -> None:
    assert plan(EngineConfig(num_threads=6)).processes[1].env["OMP_NUM_THREADS"] == "6"
    assert plan(EngineConfig(num_threads=6), openmp_set=frozenset({"OMP_NUM_THREADS"})).config.engine.num_threads == 6


@pytest.mark.parametrize(
    ("weight_bytes", "dtype", "fits"),
    [
        (8 * GIB, "auto", True),
        (8 * GIB + 2, "auto", False),
        (4 * GIB, "float32", True),
        (4 * GIB + 2, "float32", False),
    ],
)
def test_weights_that_memory_cannot_hold_are_refused_before_they_are_read(
    weight_bytes: int, dtype: str, fits: bool
) -> None:
    facts = replace(FACTS, weight_bytes=weight_bytes)
    if fits:
        plan(EngineConfig(dtype=dtype), facts)
    else:
        with pytest.raises(LaunchError, match="out of memory"):
            plan(EngineConfig(dtype=dtype), facts)


def test_an_architecture_that_is_not_served_is_named() -> None:
    with pytest.raises(LaunchError, match=r"BloomForCausalLM.*served are Llama.*--modeling transformers"):
        plan(facts=replace(FACTS, config=replace(LLAMA, architecture="BloomForCausalLM")))


def test_modeling_transformers_takes_any_architecture_on_one_cpu_rank() -> None:
    engine = EngineConfig(modeling="transformers")
    facts = replace(FACTS, config=replace(LLAMA, architecture="OlmoForCausalLM"))
    assert plan(engine, facts).config.engine.modeling == "transformers"
    for refused in (
        settings(engine=replace(engine, device="cuda")),
        settings(engine=replace(engine, rope_scaling="linear", rope_factor=2.0)),
        settings(LaunchConfig(model_id="m", num_shard=2), engine),
    ):
        with pytest.raises(LaunchError, match="--modeling transformers is served on one rank, on a CPU"):
            make_plan(refused, facts, MACHINE, openmp_set=frozenset(), gpus=Gpus())


GPTQ = replace(LLAMA, quantization={"quant_method": "gptq", "bits": 4, "group_size": 128})


def test_quantised_weights_are_named_in_the_summary() -> None:
    for wanted in (None, "gptq"):
        made = plan(EngineConfig(quantize=wanted), replace(FACTS, config=GPTQ))
        assert "gptq with 4 bits" in made.summary[0]
    assert "bits" not in plan().summary[0]


def test_auto_computes_a_quantised_float16_checkpoint_in_bfloat16_on_a_cpu() -> None:
    facts = replace(FACTS, config=replace(GPTQ, dtype="float16"))
    assert plan(facts=facts).config.engine.dtype == "bfloat16"
    assert plan(EngineConfig(dtype="float16"), facts).config.engine.dtype == "float16"
    assert plan(facts=replace(FACTS, config=replace(LLAMA, dtype="float16"))).config.engine.dtype == "float16"


def test_a_quantisation_that_is_not_served_is_named() -> None:
    with pytest.raises(LaunchError, match="model 'm': weights of the format 'exl2' are not served; served are gptq"):
        plan(facts=replace(FACTS, config=replace(LLAMA, quantization={"quant_method": "exl2"})))


@pytest.mark.parametrize(
    ("config", "message"), [(GPTQ, "the checkpoint's weights are gptq"), (LLAMA, "weights are not quantised")]
)
def test_a_quantisation_that_the_checkpoint_does_not_have_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(LaunchError, match=f"--quantize awq: .*{message}"):
        plan(EngineConfig(quantize="awq"), replace(FACTS, config=config))


ENDS = 2 * 2 * LLAMA.vocab_size * LLAMA.hidden_size
ACT8 = replace(LLAMA, quantization={"quant_method": "gptq", "bits": 8, "group_size": 128})


@pytest.mark.parametrize(
    ("config", "engine", "linear_bytes", "kept_bytes"),
    [
        (LLAMA, EngineConfig(), GIB, GIB),
        (LLAMA, EngineConfig(dtype="float32"), GIB, 2 * GIB),
        (LLAMA, EngineConfig(quantize="int8"), GIB, GIB * 9 // 16),
        (LLAMA, EngineConfig(quantize="int4"), GIB, GIB * 5 // 16),
        (LLAMA, EngineConfig(quantize="int4", dtype="float32"), GIB, 2 * GIB),
        (LLAMA, EngineConfig(quantize="bitsandbytes-nf4"), GIB, GIB),
        (GPTQ, EngineConfig(), GIB, GIB * 5 // 4),
        (GPTQ, EngineConfig(dtype="float32"), GIB, 8 * GIB),
        (ACT8, EngineConfig(), GIB, 2 * GIB),
    ],
)
def test_weights_count_in_memory_as_they_are_kept(
    config: ModelConfig, engine: EngineConfig, linear_bytes: int, kept_bytes: int
) -> None:
    ends = ENDS * 2 if engine.dtype == "float32" else ENDS
    facts = replace(FACTS, config=config, weight_bytes=linear_bytes + ENDS)
    plan(engine, facts, replace(MACHINE, memory_bytes=kept_bytes + ends))
    with pytest.raises(LaunchError, match="out of memory"):
        plan(engine, facts, replace(MACHINE, memory_bytes=kept_bytes + ends - 1))


@pytest.mark.parametrize(("wanted", "resolved"), [("auto", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_what_is_quantised_on_the_fly_computes_in_bfloat16_unless_told_otherwise(
    wanted: str, resolved: str, stored: str
) -> None:
    made = plan(EngineConfig(dtype=wanted, quantize="int8"), replace(FACTS, config=replace(LLAMA, dtype=stored)))
    assert made.config.engine.dtype == resolved
    assert "quantised to int8 while loading" in made.summary[0]


def test_a_stored_dtype_that_is_not_computed_in_needs_a_choice() -> None:
    facts = replace(FACTS, config=replace(LLAMA, dtype="float64"))
    with pytest.raises(LaunchError, match="--dtype"):
        plan(facts=facts)
    assert plan(EngineConfig(dtype="float32"), facts).config.engine.dtype == "float32"


@pytest.mark.parametrize(
    ("launch", "engine", "named"),
    [
        (LaunchConfig(), EngineConfig(), "--model-id"),
        (LaunchConfig(model_id="m", nnodes=2, node_rank=2), EngineConfig(), "--node-rank 2 of --nnodes 2"),
        (LaunchConfig(model_id="m"), EngineConfig(quantize="exl2"), "exl2 is not served; served are gptq"),
        (LaunchConfig(model_id="m"), EngineConfig(rope_factor=2.0), "--rope-scaling"),
        (LaunchConfig(model_id="m"), EngineConfig(rope_scaling="linear"), "--rope-factor"),
    ],
)
def test_what_is_not_served_is_refused_before_anything_is_fetched(
    launch: LaunchConfig, engine: EngineConfig, named: str
) -> None:
    with pytest.raises(LaunchError, match=named):
        check_served(settings(launch, engine))


def sharded_plan(num_gpus: int = 0, device: str = "cpu", **launch: Any) -> LaunchPlan:
    wanted = settings(LaunchConfig(model_id="m", **launch), EngineConfig(device=device))
    return make_plan(wanted, FACTS, MACHINE, openmp_set=frozenset(), gpus=Gpus(num_gpus))


# Rows are what TGI's launcher decides: --sharded, --num-shard, GPUs that are visible → ranks.
@pytest.mark.parametrize(
    ("sharded", "num_shard", "num_gpus", "num_ranks"),
    [
        (None, None, 0, 1),
        (None, None, 1, 1),
        (None, None, 4, 4),
        (None, 2, 4, 2),
        (False, None, 4, 1),
        (False, 2, 4, 2),
        (True, None, 4, 4),
        (True, 2, 4, 2),
        (True, 4, 0, 4),
    ],
)
def test_the_ranks_follow_the_flags_and_the_visible_gpus(
    sharded: bool | None, num_shard: int | None, num_gpus: int, num_ranks: int
) -> None:
    made = sharded_plan(num_gpus, "cuda", sharded=sharded, num_shard=num_shard)
    assert [spec.rank for spec in made.processes] == [None, *range(num_ranks)]
    assert made.config.engine.num_ranks == made.config.engine.num_local_ranks == num_ranks


@pytest.mark.parametrize(
    ("num_gpus", "device", "launch", "named"),
    [
        (1, "cuda", {"sharded": True}, "1 GPU is visible"),
        (0, "cuda", {"sharded": True}, "no GPU is visible"),
        (4, "cpu", {"sharded": True}, "on the CPU there are none"),
        (2, "cuda", {"num_shard": 3}, "2 GPUs are visible"),
        (0, "cpu", {"num_shard": 3, "nnodes": 2}, "cannot be shared evenly by --nnodes 2"),
        (0, "cpu", {"num_shard": 5}, "5 ranks are more than the model's 4 attention heads"),
    ],
)
def test_ranks_that_cannot_be_are_refused(num_gpus: int, device: str, launch: dict[str, Any], named: str) -> None:
    with pytest.raises(LaunchError, match=named):
        sharded_plan(num_gpus, device, **launch)


def test_visible_gpus_are_no_ranks_on_the_cpu() -> None:
    assert sharded_plan(4, "cpu").config.engine.num_ranks == 1


@pytest.mark.parametrize(
    ("gpus", "modeling", "device", "note"),
    [
        (Gpus(), "auto", "cpu", None),
        (Gpus(2), "auto", "cuda", None),
        (Gpus(2), "transformers", "cpu", None),
        (Gpus(0, "1 GPU visible, not used"), "auto", "cpu", "1 GPU visible, not used"),
    ],
)
def test_auto_is_a_gpu_where_one_can_be_used(gpus: Gpus, modeling: str, device: str, note: str | None) -> None:
    wanted = settings(LaunchConfig(model_id="m"), EngineConfig(modeling=modeling))
    made = make_plan(wanted, FACTS, MACHINE, openmp_set=frozenset(), gpus=gpus)
    assert made.config.engine.device == device and {spec.device for spec in made.processes} == {None, device}
    assert made.config.engine.num_ranks == max(1, gpus.count if device == "cuda" else 1)
    assert (note in made.summary) == (note is not None)


def test_a_hosts_memory_need_not_hold_weights_that_go_to_a_gpu() -> None:
    wanted, small = settings(LaunchConfig(model_id="m"), EngineConfig()), Machine(num_cores=1, memory_bytes=10)
    make_plan(wanted, FACTS, small, openmp_set=frozenset(), gpus=Gpus(1))
    with pytest.raises(LaunchError, match="out of memory"):
        make_plan(wanted, FACTS, small, openmp_set=frozenset(), gpus=Gpus())


def test_ranks_of_one_machine_share_its_cores() -> None:
    made = sharded_plan(num_shard=4)
    assert [spec.name for spec in made.processes] == ["api", "engine", "engine-1", "engine-2", "engine-3"]
    assert [spec.env["OMP_NUM_THREADS"] for spec in made.processes[1:]] == ["2"] * 4
    assert [spec.argv[-2:] for spec in made.processes[1:]] == [("--rank", str(rank)) for rank in range(4)]
    assert made.config.engine.num_threads == 2
    assert made.meeting_point is None


def test_each_machine_starts_its_own_ranks_and_the_first_one_the_api() -> None:
    machines = {"num_shard": 4, "nnodes": 2, "master_addr": "10.0.0.1", "master_port": 1234}
    first, second = (sharded_plan(**machines, node_rank=rank) for rank in (0, 1))
    assert [spec.name for spec in first.processes] == ["api", "engine", "engine-1"]
    assert [spec.name for spec in second.processes] == ["engine-2", "engine-3"]
    assert first.meeting_point == second.meeting_point == "tcp://10.0.0.1:1234"
    assert first.config.engine.num_ranks == 4 and first.config.engine.num_local_ranks == 2


@pytest.mark.parametrize(
    ("launch", "limit"), [({}, 0), ({"num_shard": 2}, 5), ({"num_shard": 2, "max_engine_restarts": 0}, 0)]
)
def test_a_group_of_ranks_is_started_again_and_a_single_engine_only_when_asked(
    launch: dict[str, Any], limit: int
) -> None:
    assert sharded_plan(**launch).max_engine_restarts == limit
    assert sharded_plan(max_engine_restarts=3).max_engine_restarts == 3


def test_the_summary_says_what_was_resolved() -> None:
    adapter = AdapterSpec(adapter_id="pirate", path="/a", digest="d", rank=8, num_bytes=100)
    text = "\n".join(plan(facts=replace(FACTS, adapters=(adapter,))).summary)
    for word in ("m at abc", "LlamaForCausalLM", "bfloat16", "cpu", "4 threads", "1 rank", "pirate", "rank 8"):
        assert word in text
