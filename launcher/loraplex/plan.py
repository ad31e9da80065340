"""From settings and what was found to the processes to start; decides, and touches nothing."""

import re
import sys
from dataclasses import dataclass, replace

from loraplex.flags import Settings
from loraplex.gpus import Gpus
from loraplex.launch_error import LaunchError
from loraplex_models.architectures import ARCHITECTURES, refusal
from loraplex_models.config import ModelConfig
from loraplex_models.cuts import CutError, RankPart
from loraplex_quant.config import OnTheFly, QuantConfig, QuantConfigError, check_flag, settle_quantization
from loraplex_server.config import DTYPES, FAIRNESS_KEY_PATTERN, EngineConfig, LaunchConfig, ServeConfig
from loraplex_server.machine import Machine
from loraplex_server.messages import AdapterSpec

# Beyond four threads a decode step gains little, and on a shared machine it loses.
MAX_DEFAULT_THREADS = 4
# How often an idle OpenMP thread looks for work before it sleeps. libgomp's default spins for milliseconds, which on
# a shared two-core machine can make a step ten times slower; this keeps nearly all of the idle machine's speed.
SPIN_COUNT = "2000"
# A lost group of ranks is started again so often in a row: a fault that comes back each time is not cured by trying.
DEFAULT_RESTARTS = 5
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
SCALE_BITS = 1  # of scales and zeros, for each number
GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """The base model and the adapters, found and checked on this machine."""

    path: str
    model_id: str
    revision: str | None
    config: ModelConfig
    weight_bytes: int
    adapters: tuple[AdapterSpec, ...] = ()
    notes: tuple[str, ...] = ()  # what a person should know about them


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to start: `env` is added to the launcher's own environment."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    rank: int | None = None  # of an engine process
    device: str | None = None


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All that the supervisor needs: the processes in starting order, their configuration, and lines for a person.

    `meeting_point` is where the ranks of several machines meet; those of one machine meet in the private folder.
    """

    config: ServeConfig
    processes: tuple[ProcessSpec, ...]
    summary: tuple[str, ...] = ()
    max_engine_restarts: int = 0
    meeting_point: str | None = None


def check_served(settings: Settings) -> None:
    """Refuse, before anything is downloaded, what this version does not serve."""
    launch, engine = settings.launch, settings.serve.engine
    if not (launch.model_id or launch.weights_cache_override):
        raise LaunchError(
            "no model given: name one with --model-id (a local folder or a hub id), or run 'loraplex demo'"
        )
    if launch.node_rank >= launch.nnodes:
        raise LaunchError(f"--node-rank {launch.node_rank} of --nnodes {launch.nnodes}: they are counted from 0")
    if engine.quantize:
        try:
            check_flag(engine.quantize)
        except QuantConfigError as error:
            raise LaunchError(str(error)) from None
    if (engine.rope_scaling is None) != (engine.rope_factor is None):
        raise LaunchError("--rope-scaling and --rope-factor belong together: give both or neither")
    fairness_key = settings.serve.api.fairness_key
    if not re.fullmatch(FAIRNESS_KEY_PATTERN, fairness_key):
        raise LaunchError(f"--fairness-key is '{fairness_key}': choose adapter, api-key, header:NAME or none")


def make_plan(
    settings: Settings,
    facts: CheckpointFacts,
    machine: Machine,
    *,
    openmp_set: frozenset[str],
    gpus: Gpus,
) -> LaunchPlan:
    """Resolve every «auto» that the launcher can resolve, and name the processes.

    `openmp_set`: the OpenMP variables that the user has set, which stay as they are.
    Raises LaunchError.
    """
    engine = settings.serve.engine
    if facts.config.architecture not in ARCHITECTURES and engine.modeling == "auto":
        raise LaunchError(f"model '{facts.model_id}': {refusal(facts.config.architecture)}")
    quantization = _quantization(engine.quantize, facts)
    device = _device(engine, gpus)
    num_ranks = _num_ranks(settings.launch, device, gpus.count)
    num_local_ranks = num_ranks // settings.launch.nnodes
    if engine.modeling == "transformers" and (num_ranks > 1 or device != "cpu" or engine.rope_scaling):
        raise LaunchError("--modeling transformers is served on one rank, on a CPU and without --rope-scaling only")
    _check_cut(facts, num_ranks)
    dtype = _dtype(engine.dtype, facts, quantization, device)
    if device == "cpu":
        _check_memory(facts, dtype, quantization, machine)
    cores = max(1, machine.num_cores // num_local_ranks)
    default_threads = 0 if "OMP_NUM_THREADS" in openmp_set else min(cores, MAX_DEFAULT_THREADS)
    threads = engine.num_threads or default_threads
    resolved = replace(
        engine,
        model_path=facts.path,
        dtype=dtype,
        device=device,
        num_threads=threads,
        num_ranks=num_ranks,
        num_local_ranks=num_local_ranks,
        adapters=replace(engine.adapters, sources=facts.adapters),
    )
    launch = settings.launch
    api = replace(settings.serve.api, model_id=facts.model_id, model_sha=facts.revision)
    first_rank = launch.node_rank * num_local_ranks
    engines = (
        ProcessSpec(
            "engine" if rank == 0 else f"engine-{rank}",
            (*_child_argv("engine"), "--rank", str(rank)),
            _openmp(threads, openmp_set),
            rank=rank,
            device=device,
        )
        for rank in range(first_rank, first_rank + num_local_ranks)
    )
    apis = (ProcessSpec("api", _child_argv("api"), {}),) if launch.node_rank == 0 else ()
    default_restarts = DEFAULT_RESTARTS if num_ranks > 1 else 0
    return LaunchPlan(
        config=replace(settings.serve, api=api, engine=resolved),
        processes=(*apis, *engines),
        summary=_summary(facts, quantization, resolved, gpus.note if engine.device == "auto" else None),
        max_engine_restarts=default_restarts if launch.max_engine_restarts is None else launch.max_engine_restarts,
        meeting_point=_meeting_point(launch) if launch.nnodes > 1 else None,
    )


def _device(engine: EngineConfig, gpus: Gpus) -> str:
    if engine.device != "auto":
        return engine.device
    return "cuda" if gpus.count and engine.modeling != "transformers" else "cpu"


def _num_ranks(launch: LaunchConfig, device: str, num_gpus: int) -> int:
    """How many ranks share the model, over all machines; TGI's launcher decides the same way."""
    visible = num_gpus if device == "cuda" else 0
    if launch.num_shard is not None:
        num_ranks = launch.num_shard
    elif launch.sharded:
        if visible < 2:
            found = "on the CPU there are none" if device == "cpu" else f"{visible or 'no'} GPU is visible"
            raise LaunchError(f"--sharded true takes all visible GPUs, and {found}: say how many with --num-shard")
        num_ranks = visible * launch.nnodes
    else:
        num_ranks = launch.nnodes if launch.sharded is False else (visible or 1) * launch.nnodes
    if num_ranks % launch.nnodes:
        raise LaunchError(f"--num-shard {num_ranks} cannot be shared evenly by --nnodes {launch.nnodes}")
    if visible and num_ranks // launch.nnodes > visible:
        raise LaunchError(f"--num-shard {num_ranks}: {visible} GPUs are visible on this machine")
    return num_ranks


def _check_cut(facts: CheckpointFacts, num_ranks: int) -> None:
    try:
        for rank in range(num_ranks):
            RankPart(facts.config, rank, num_ranks)
    except CutError as error:
        raise LaunchError(f"model '{facts.model_id}': {error}") from None


def _meeting_point(launch: LaunchConfig) -> str:
    host = f"[{launch.master_addr}]" if ":" in launch.master_addr else launch.master_addr
    return f"tcp://{host}:{launch.master_port}"


def _openmp(threads: int, already_set: frozenset[str]) -> dict[str, str]:
    """OpenMP's variables for the engine, which must be there before torch is imported."""
    variables = {"OMP_NUM_THREADS": str(threads)} if "OMP_NUM_THREADS" not in already_set else {}
    if not already_set & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        variables["GOMP_SPINCOUNT"] = SPIN_COUNT
    return variables


def _child_argv(name: str) -> tuple[str, ...]:
    # -P: nothing that happens to lie in the working directory is imported.
    return (sys.executable, "-P", "-m", "loraplex.processes", name)


def _dtype(wanted: str, facts: CheckpointFacts, quantization: QuantConfig | OnTheFly | None, device: str) -> str:
    dtype = facts.config.dtype if wanted == "auto" else wanted
    is_on_the_fly, is_stored = isinstance(quantization, OnTheFly), isinstance(quantization, QuantConfig)
    if wanted == "auto" and device == "cpu" and (is_on_the_fly or (is_stored and dtype == "float16")):
        # Quantised checkpoints say float16 for their kernels' sake; it is ten times slower on CPUs, and no linear of
        # the checkpoint is stored in it. What is quantised on the fly is kept small in bfloat16 only.
        return "bfloat16"
    if dtype not in DTYPES:
        raise LaunchError(f"model '{facts.model_id}' is stored as {dtype}: choose --dtype {', '.join(DTYPES)}")
    return dtype


def _quantization(wanted: str | None, facts: CheckpointFacts) -> QuantConfig | OnTheFly | None:
    try:
        stored, on_the_fly = settle_quantization(wanted, facts.config.quantization)
    except QuantConfigError as error:
        raise LaunchError(f"model '{facts.model_id}': {error}") from None
    return stored or on_the_fly


def _check_memory(
    facts: CheckpointFacts, dtype: str, quantization: QuantConfig | OnTheFly | None, machine: Machine
) -> None:
    config, stored = facts.config, DTYPE_BYTES.get(facts.config.dtype, 2)
    needed = facts.weight_bytes * DTYPE_BYTES[dtype] // stored
    if quantization is not None:
        # Embedding and head are counted as plain; the rest is kept as small numbers, or becomes plain while it is read.
        ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
        stored_bits = 8 * stored if isinstance(quantization, OnTheFly) else quantization.bits
        linears = max(0, facts.weight_bytes - ends * stored) * 8 // stored_bits
        kept_bits = max(4, quantization.bits) + SCALE_BITS if _keeps_small_numbers(quantization, dtype) else None
        per_linear = 8 * DTYPE_BYTES[dtype] if kept_bits is None else kept_bits
        needed = ends * DTYPE_BYTES[dtype] + linears * per_linear // 8
    if needed > machine.memory_bytes:
        raise LaunchError(
            f"out of memory: the weights of '{facts.model_id}' take {needed / GIB:.1f} GiB as {dtype} and "
            f"{machine.memory_bytes / GIB:.1f} GiB are free: choose a smaller model, a shorter --dtype, or free memory"
        )


def _keeps_small_numbers(quantization: QuantConfig | OnTheFly, dtype: str) -> bool:
    """Whether a CPU computes with the small numbers as they are; see `loraplex_quant.small_int`."""
    if dtype != "bfloat16":
        return False
    if isinstance(quantization, OnTheFly):
        return quantization.kind in ("int8", "int4")
    return quantization.method in ("gptq", "awq", "compressed-tensors") and quantization.bits <= 4


def _summary(
    facts: CheckpointFacts, quantization: QuantConfig | OnTheFly | None, engine: EngineConfig, note: str | None
) -> tuple[str, ...]:
    at = f" at {facts.revision}" if facts.revision else ""
    threads = f"{engine.num_threads} threads" if engine.num_threads else "threads as OMP_* says"
    stored = ""
    if isinstance(quantization, QuantConfig):
        stored = f", {quantization.name} with {quantization.bits} bits"
    elif quantization is not None:
        stored = f", quantised to {quantization.kind} while loading"
    lines = [
        f"model {facts.model_id}{at}: {facts.config.architecture}, {facts.config.num_layers} layers, "
        f"{facts.weight_bytes / MIB:.0f} MiB{stored} in {facts.path}",
        f"computing in {engine.dtype} on {engine.device} with {threads}, {engine.num_ranks} rank"
        + ("s" if engine.num_ranks > 1 else ""),
    ]
    lines += [
        f"adapter {adapter.adapter_id}: rank {adapter.rank}, {adapter.num_bytes / MIB:.1f} MiB from {adapter.path}"
        for adapter in facts.adapters
    ]
    return (*lines, *facts.notes, *([note] if note else []))
