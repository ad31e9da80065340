"""What /metrics says of adapters, tier by tier, and what routers read of it."""

from scripted_engine import TestServer, with_server

from loraplex_server.messages import EngineStats, StepOutput


def lines_after(stats: EngineStats) -> list[str]:
    found: list[str] = []

    async def test(server: TestServer) -> None:
        server.engine.say(StepOutput(outputs=[], stats=stats))
        await server.generate("")  # lets the message through
        found.extend((await server.http.get("/metrics")).text.splitlines())

    with_server(test)
    return found


def test_tiers_loads_evictions_and_waits_are_counted_by_tier():
    lines = lines_after(
        EngineStats(
            num_adapters_registered=9,
            num_adapters_in_host=5,
            num_adapters_resident=3,
            adapter_host_bytes=500,
            adapter_device_bytes=300,
            num_host_loads=6,
            num_device_loads=4,
            num_host_evictions=1,
            num_device_evictions=2,
            num_failed_loads=1,
            host_load_s=[0.5],
            device_load_s=[0.25, 0.25],
            adapter_wait_s=[1.0, 2.0],
        )
    )
    for line in (
        "loraplex_adapters_registered 9.0",
        "loraplex_adapters_in_host 5.0",
        "loraplex_adapters_resident 3.0",
        "loraplex_adapter_host_bytes 500.0",
        "loraplex_adapter_device_bytes 300.0",
        'loraplex_adapter_loads{tier="host"} 6',
        'loraplex_adapter_loads{tier="device"} 4',
        'loraplex_adapter_evictions{tier="host"} 1',
        'loraplex_adapter_evictions{tier="device"} 2',
        "loraplex_adapter_load_failures 1",
        'loraplex_adapter_load_duration_sum{tier="device"} 0.5',
        "loraplex_adapter_wait_count 2.0",
        "loraplex_adapter_wait_sum 3.0",
        "vllm:num_gpu_loaded_lora_adapters 3",
        "vllm:num_cpu_loaded_lora_adapters 5",
    ):
        assert line in lines, line


def test_routers_read_one_info_series_with_running_and_waiting_adapters_apart():
    lines = lines_after(
        EngineStats(
            num_running=2,
            num_waiting=1,
            num_kv_blocks_used=10,
            running_adapters={"b": 1, "a": 1},
            waiting_adapters={'c"': 1},
            resident_adapter_ids=["a", "b", "idle"],
        )
    )
    (info,) = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
    labels, _, value = info.rpartition(" ")
    assert labels == ('vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c\\""}')
    assert float(value) > 1.7e9
    assert 'vllm:kv_cache_usage_perc{model_name="tiny-base"} 0.25' in lines
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="40"} 1' in lines
    loaded = [line for line in lines if line.startswith("vllm:lora_adapter_loaded{")]
    assert loaded == [f'vllm:lora_adapter_loaded{{adapter_name="{name}",level="gpu"}} 1' for name in ("a", "b", "idle")]


def test_names_in_labels_are_bounded():
    names = [f"adapter-{number}" for number in range(10_000)]
    lines = lines_after(EngineStats(resident_adapter_ids=names, running_adapters=dict.fromkeys(names, 1)))
    assert sum(len(line) for line in lines) < 200_000
