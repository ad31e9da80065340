"""Entry point of an engine process: load, report ready, then the loop of messages and steps."""

import logging
import signal
import time
from collections.abc import Callable

import torch

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.warm_up import compiling_notice, warm_up
from loraplex_models.adapters.cut import cut_adapter
from loraplex_models.adapters.finish import check_against_base
from loraplex_models.adapters.manifest import ManifestError, check_adapter, module_shapes
from loraplex_models.adapters.merge import merge_adapters
from loraplex_models.adapters.merge_recipe import MergeRecipe
from loraplex_models.adapters.pages import num_device_bytes
from loraplex_models.adapters.row_sums import UnfinishedWeights, take_shares
from loraplex_models.adapters.weights import AdapterWeights, load_adapter_weights
from loraplex_models.checkpoint import CheckpointError
from loraplex_models.config import ModelConfig, ModelConfigError, read_config
from loraplex_models.cuts import CutError, RankPart
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup, RanksLost
from loraplex_quant.config import settle_quantization
from loraplex_server.config import EngineConfig, ServeConfig
from loraplex_server.control import ControlLine
from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.engine.device import DeviceError, rank_device, resolve_device
from loraplex_server.engine.device_sampler import sampler_kind, sampling_warm_ups
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.executor import LocalExecutor
from loraplex_server.engine.guided import GrammarLibrary, GuidedRows
from loraplex_server.engine.heartbeat import Heartbeat
from loraplex_server.engine.kernel_proof import prove_kernels
from loraplex_server.engine.memory import Limits, NotEnoughMemory, settle_adapter_room, settle_group_limits
from loraplex_server.engine.profile import free_kv_bytes
from loraplex_server.engine.prompt_attention import open_prompt_attention
from loraplex_server.engine.shards import GroupExecutor, follow
from loraplex_server.engine.worker import Worker
from loraplex_server.garbage import keep_what_is_loaded
from loraplex_server.link import EngineLink
from loraplex_server.messages import (
    AbortRequest,
    AdapterSpec,
    EngineReady,
    GenerateRequest,
    KeepAdapter,
    LoadAdapter,
    SamplingParams,
    ToEngine,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How long the loop sleeps when nothing is to be done; a message ends the sleep at once.
IDLE_WAIT_S = 1.0
# How long it sleeps when every sequence waits for an adapter that a reader thread is still loading.
LOADING_WAIT_S = 0.002
# Loading is reported to the supervisor this often.
PROGRESS_INTERVAL_S = 0.2
# Adapters that the report at start names one by one.
MAX_LISTED_ADAPTERS = 20


def build_engine(config: EngineConfig, model: CausalLM, limits: Limits) -> Engine:
    """The engine over the ranks of the model's group, of which this process is rank 0."""
    end_token_ids = model.config.end_token_ids
    grammars = GrammarLibrary(config.model_path, model.config.vocab_size, tuple(end_token_ids))
    worker = build_worker(config, model, limits, grammars)
    return Engine(
        config,
        LocalExecutor(worker) if model.group.size == 1 else GroupExecutor(worker, model.group),
        num_kv_blocks=limits.num_kv_blocks,
        end_token_ids=frozenset(end_token_ids),
        grammars=grammars,
        device_bytes_of=_device_bytes_of(model.config, model.dtype.itemsize),
        runs_ahead=_runs_ahead(config, model.device),
    )


def build_worker(
    config: EngineConfig, model: CausalLM, limits: Limits, grammars: GrammarLibrary | None = None
) -> Worker:
    """This process's rank, on the device that the model is on; rank 0 samples, and takes grammars for that."""
    group, dtype = model.group, model.dtype
    whole = read_config(config.model_path)
    part = RankPart(whole, group.rank, group.size)

    def read_whole(path: str) -> AdapterWeights:
        manifest = check_adapter(path, whole, max_rank=config.adapters.max_lora_rank)
        return load_adapter_weights(path, manifest, dtype=dtype)

    def read_adapter(source: str | MergeRecipe) -> AdapterWeights | UnfinishedWeights:
        if isinstance(source, MergeRecipe):
            weights = merge_adapters([read_whole(part.path) for part in source.parts], source)
        else:
            weights = read_whole(source)
        weights = cut_adapter(weights, part)
        return take_shares(check_against_base(weights, model), model, part)

    sampler = sampler_kind(model.device)(
        config.max_batch_size,
        model.config.vocab_size,
        model.device,
        watermark_gamma=config.watermark_gamma,
        watermark_delta=config.watermark_delta,
        guided_rows=None if grammars is None else GuidedRows(grammars),
    )
    worker = Worker(
        model,
        num_kv_blocks=limits.num_kv_blocks,
        block_size=config.block_size,
        max_batch_size=config.max_batch_size,
        max_total_tokens=limits.max_total_tokens,
        prefill_tokens=config.prefill_tokens,
        num_slots=config.adapters.max_resident_adapters,
        max_lora_rank=config.adapters.max_lora_rank,
        read_adapter=read_adapter,
        sampler=sampler,
        group=group,
        shares_tokens=_runs_ahead(config, model.device),
        adapter_room=settle_adapter_room(config),
    )
    worker.warm_up()
    return worker


def _runs_ahead(config: EngineConfig, device: torch.device) -> bool:
    """On a CPU the host that plans is the device that computes: nothing is won there."""
    return config.overlap_steps == "on" or (config.overlap_steps == "auto" and device.type == "cuda")


def _device_bytes_of(config: ModelConfig, itemsize: int) -> Callable[[AdapterSpec], int]:
    """What an adapter takes on the device: its own ranks, in whole pages."""
    shapes = module_shapes(config)
    return lambda spec: num_device_bytes(spec.rank_rows, spec.dense_elements, shapes, itemsize)


def resolve_dtype(name: str, checkpoint_dtype: str) -> torch.dtype:
    """«auto» is what the checkpoint holds."""
    return DTYPES[checkpoint_dtype if name == "auto" else name]


def load_base_model(
    config: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
    group: ParallelGroup | None = None,
) -> CausalLM:
    """The base model with its weights, or a rank's part; `progress` is told the bytes done and the bytes in all."""
    group = ParallelGroup.single() if group is None else group
    shape, device = read_config(config.model_path), rank_device(config, group.rank)
    dtype = resolve_dtype(config.dtype, shape.dtype)
    if device.type == "cuda" and config.check_kernels:
        stored, on_the_fly = settle_quantization(config.quantize, shape.quantization)
        prove_kernels(RankPart(shape, group.rank, group.size).config, stored or on_the_fly, dtype, device)
    prompt_attention = open_prompt_attention(config, RankPart(shape, group.rank, group.size).config, dtype, device)
    model = load_model(
        config.model_path,
        dtype=dtype,
        device=device,
        group=group,
        rope_scaling=config.rope_scaling,
        rope_factor=config.rope_factor,
        quantize=config.quantize,
        by_transformers=config.modeling == "transformers",
        progress=progress,
    )
    model.prompt_attention = prompt_attention
    return model


def run(config: ServeConfig, control: ControlLine, rank: int = 0) -> int:
    """The life of an engine process; returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor stops us in order
    heartbeat = Heartbeat(control)
    try:
        if rank == 0:
            _lead(config, heartbeat)
        else:
            _follow(config, heartbeat, rank)
    except (CheckpointError, ModelConfigError, ManifestError, NotEnoughMemory, CutError, DeviceError) as error:
        heartbeat.send("failed", error=str(error))
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        heartbeat.send("failed", error=f"out of memory while loading: {error}; try a smaller model or a shorter dtype")
        return 1
    except RanksLost as error:
        logger.error("rank %d has lost the others: %s", rank, error)
        heartbeat.send("ranks_lost")
        return 1
    finally:
        heartbeat.close()
    return 0


def _lead(config: ServeConfig, heartbeat: Heartbeat) -> None:
    """Rank 0: load, report ready, and serve until the supervisor says stop or is gone."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    model = _load(config, heartbeat, rank=0)
    limits = settle_group_limits(config.engine, model, free_kv_bytes(config.engine, model))
    engine = build_engine(config.engine, model, limits)
    try:
        _warm_up(engine, model)
        for spec in config.engine.adapters.sources:
            engine.load_adapter(spec)
        keep_what_is_loaded()
        link = EngineLink(config.link_address)
        try:
            link.send(_ready(config.engine, model, limits, engine.adapters))
            heartbeat.send("ready", report=_capacity_report(config.engine, model, limits, engine.adapters))
            _loop(engine, link, heartbeat, stopping)
        finally:
            link.close()
    finally:
        engine.close()


def _follow(config: ServeConfig, heartbeat: Heartbeat, rank: int) -> None:
    """The other ranks: load, report ready, and obey rank 0 until it ends."""
    model = _load(config, heartbeat, rank)
    limits = settle_group_limits(config.engine, model, free_kv_bytes(config.engine, model))
    worker = build_worker(config.engine, model, limits)
    warm_up(model.dtype, model.device, has_experts=model.config.experts is not None)
    keep_what_is_loaded()
    heartbeat.send("ready", report=[])
    follow(worker, model.group, heartbeat)


def _load(config: ServeConfig, heartbeat: Heartbeat, rank: int) -> CausalLM:
    engine = config.engine
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    group = ParallelGroup.join(rank, engine.num_ranks, config.rendezvous, rank_device(engine, rank))
    last_report = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_report
        now = time.monotonic()
        if rank == 0 and (now - last_report >= PROGRESS_INTERVAL_S or done == total):
            last_report = now
            heartbeat.send("progress", phase="loading weights", done=done, total=total)

    return load_base_model(engine, progress, group)


def _warm_up(engine: Engine, model: CausalLM) -> None:
    """Compile and lay out what the first request would otherwise wait for; a first compilation may take long."""
    if (notice := compiling_notice(model.device)) is not None:
        logger.info(notice)
    warm_up(model.dtype, model.device, has_experts=model.config.experts is not None)
    samplings = [SamplingParams(max_new_tokens=2)]
    if has_gpu_forms(model.device):
        samplings += sampling_warm_ups()
    for sampling in samplings:
        engine.add(GenerateRequest(request_id="", prompt_token_ids=[0, 0], sampling=sampling))
        while engine.has_work:
            engine.step()


def _loop(engine: Engine, link: EngineLink, heartbeat: Heartbeat, stopping: list[int]) -> None:
    link.watch(heartbeat.fileno())
    while not stopping:
        if heartbeat.lost_supervisor:
            logger.warning("the supervisor is gone; the engine stops")
            return
        for message in link.receive():
            _take(engine, message)
        with heartbeat.at_work():
            output = engine.step()
        for status in engine.adapters.take_statuses():
            link.send(status)
        if output is not None:
            link.send(output)
        elif engine.has_work:
            if engine.is_idle:
                link.wait(LOADING_WAIT_S)
        else:
            link.wait(IDLE_WAIT_S)


def _take(engine: Engine, message: ToEngine) -> None:
    match message:
        case GenerateRequest():
            engine.add(message)
        case AbortRequest(request_id=request_id):
            engine.abort(request_id)
        case LoadAdapter(spec=spec):
            engine.load_adapter(spec)
        case KeepAdapter(digest=digest, is_kept=is_kept):
            engine.keep_adapter(digest, is_kept)
        case UnloadAdapter(digest=digest):
            engine.unload_adapter(digest)


def _ready(config: EngineConfig, model: CausalLM, limits: Limits, adapters: AdapterManager) -> EngineReady:
    return EngineReady(
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        max_batch_prefill_tokens=config.prefill_tokens,
        max_batch_total_tokens=limits.num_kv_blocks * config.block_size,
        max_batch_size=config.max_batch_size,
        num_kv_blocks=limits.num_kv_blocks,
        block_size=config.block_size,
        vocab_size=model.config.vocab_size,
        end_token_ids=list(model.config.end_token_ids),
        dtype=str(resolve_dtype(config.dtype, model.config.dtype)).removeprefix("torch."),
        device=resolve_device(config.device),
        max_loras=config.adapters.max_resident_adapters,
        adapter_host_budget_bytes=adapters.host.budget_bytes,
        adapter_device_budget_bytes=adapters.device.budget_bytes,
    )


def _capacity_report(config: EngineConfig, model: CausalLM, limits: Limits, adapters: AdapterManager) -> list[str]:
    """What fits, in lines for a person."""
    mib = 1024 * 1024
    dtype = str(resolve_dtype(config.dtype, model.config.dtype)).removeprefix("torch.")
    ranks = f"{config.num_ranks} ranks" if config.num_ranks > 1 else "1 rank"
    each = " on rank 0" if config.num_ranks > 1 else ""
    lines = [
        f"engine: {dtype} on {resolve_device(config.device)}, {torch.get_num_threads()} threads, {ranks}",
        f"weights: {model.num_bytes / mib:.0f} MiB{each}",
        f"KV cache: {limits.num_kv_blocks} blocks of {config.block_size} tokens = "
        f"{limits.num_kv_blocks * config.block_size} tokens, {limits.kv_bytes / mib:.0f} MiB{each}; "
        f"requests up to {limits.max_input_tokens} + output = {limits.max_total_tokens} tokens",
    ]
    sources = config.adapters.sources
    lines += [
        f"adapter '{source.adapter_id}': rank {source.rank}, {source.num_bytes / mib:.1f} MiB"
        for source in sources[:MAX_LISTED_ADAPTERS]
    ]
    if len(sources) > MAX_LISTED_ADAPTERS:
        lines.append(f"… and {len(sources) - MAX_LISTED_ADAPTERS} adapters more")
    used = sum(source.num_bytes for source in sources)
    lines.append(
        f"adapters: {len(sources)} known, {used / mib:.1f} MiB; up to {adapters.host.budget_bytes / mib:.0f} MiB of "
        f"weights in host memory, and of these {adapters.device.budget_bytes / mib:.0f} MiB or "
        f"{config.adapters.max_resident_adapters} adapters ready to run; the others are read again when they are needed"
    )
    return lines
