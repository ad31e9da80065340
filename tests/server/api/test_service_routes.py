"""Health, information, models, metrics, documentation."""

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine, TestServer, with_server

from loraplex_server.messages import EngineStats, StepOutput
from loraplex_server.metrics import MAX_ADAPTER_LABELS, Metrics


def series(text: str) -> dict[str, float]:
    """Every sample of a scrape by name and labels; a malformed line fails."""
    samples = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        matched = re.fullmatch(r"([a-z0-9_:]+(?:\{[^{}]*\})?) ([0-9.e+-]+|[+-]Inf|NaN)", line)
        assert matched, line
        samples[matched[1]] = float(matched[2])
    return samples


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_health_is_200_and_empty_when_ready(path: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")

    with_server(test)


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_health_is_503_before(path: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.get(path)
        assert (answer.status_code, answer.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})

    with_server(test, is_ready=False)


def test_before_ready_metrics_models_and_docs_answer_and_inference_is_503_with_retry_after() -> None:
    async def test(server: TestServer) -> None:
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json"):
            assert (await server.http.get(path)).status_code == 200
        answer = await server.generate("hi")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
        assert answer.headers["retry-after"] == "1"

    with_server(test, is_ready=False)


def test_info_has_the_fields_of_every_tgi_release() -> None:
    async def test(server: TestServer) -> None:
        info = (await server.http.get("/info")).json()
        assert set(info) >= {
            "model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag",
            "max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens", "max_input_length",
            "max_total_tokens", "waiting_served_ratio", "max_batch_total_tokens", "max_waiting_tokens",
            "max_batch_size", "validation_workers", "max_client_batch_size", "router", "version", "sha",
            "docker_label",
        }  # fmt: skip
        assert info["router"] == "text-generation-router"
        assert int(info["version"].split(".")[0]) >= 3
        assert (info["model_id"], info["max_input_tokens"], info["max_total_tokens"]) == ("tiny-base", 40, 60)

    with_server(test)


def test_models_are_the_base_and_then_the_adapters_with_their_parent() -> None:
    async def test(server: TestServer) -> None:
        models = (await server.http.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["tiny-base", "org/a", "b"]
        assert [model["parent"] for model in models["data"]] == [None, "tiny-base", "tiny-base"]
        for model in models["data"]:
            assert (model["object"], model["max_model_len"]) == ("model", 60)
            assert (await server.http.get(f"/v1/models/{model['id']}")).json() == model
            named = await server.http.get(f"/v1/models/tiny-base:{model['id']}")
            assert model["parent"] is None or named.json() == model

    with_server(test, adapters=("org/a", "b"))


def test_the_openapi_document_names_every_route_and_resolves_its_references() -> None:
    async def test(server: TestServer) -> None:
        document = (await server.http.get("/openapi.json")).json()
        assert (await server.http.get("/api-doc/openapi.json")).json() == document
        served = {route.path for route in server.http._transport.app.routes}
        documented = {
            path.replace("{model_id}", "{model_id:path}").replace("{name}", "{name:path}") for path in document["paths"]
        }
        assert served - documented == {"/docs", "/openapi.json", "/api-doc/openapi.json"}
        schemas = document["components"]["schemas"]

        def check(value: Any) -> None:
            if isinstance(value, dict):
                if "$ref" in value:
                    assert value["$ref"].removeprefix("#/components/schemas/") in schemas
                for inner in value.values():
                    check(inner)
            elif isinstance(value, list):
                for inner in value:
                    check(inner)

        check(document)
        assert "temperature" in schemas["GenerateParameters"]["properties"]

    with_server(test)


def test_the_docs_page_lists_the_routes_and_loads_nothing_from_elsewhere() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.get("/docs")
        assert answer.headers["content-type"].startswith("text/html")
        for text in ("/generate_stream", "repetition_penalty", "/v1/models", "curl"):
            assert text in answer.text
        assert "<script" not in answer.text
        assert "https://" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]

    with_server(test)


def test_metrics_count_requests_by_how_they_ended() -> None:
    async def test(server: TestServer) -> None:
        before = series((await server.http.get("/metrics")).text)
        assert (before["tgi_request_count"], before["tgi_request_success"]) == (0, 0)
        await server.generate("hi")
        await server.generate("hi", path="/generate_stream", adapter_id="pirate")
        await server.generate("hi", do_sample=True, best_of=2)
        await server.generate("")
        await server.generate("hi", adapter_id="no-such")
        after = series((await server.http.get("/metrics")).text)
        assert (after["tgi_request_count"], after["tgi_request_success"]) == (5, 3)
        assert after['tgi_request_failure{err="validation"}'] == 1
        assert after['tgi_request_failure{err="adapter"}'] == 1
        assert after["tgi_request_generated_tokens_count"] == 4
        assert after["tgi_request_generated_tokens_sum"] == 12 * 3 + 4
        assert after["tgi_request_input_length_sum"] == 12
        assert after["tgi_request_max_new_tokens_count"] == 3
        assert after['loraplex_adapter_requests{adapter_id="pirate"}'] == 1
        assert not any("no-such" in name for name in after)
        for name in ("", "_validation", "_queue", "_inference", "_mean_time_per_token"):
            assert after[f"tgi_request{name}_duration_count"] > 0

    with_server(test)


def test_a_failed_generation_is_counted_as_one() -> None:
    async def test(server: TestServer) -> None:
        await server.generate("hi")
        await server.generate("hi", path="/generate_stream")
        assert series((await server.http.get("/metrics")).text)['tgi_request_failure{err="generation"}'] == 2

    with_server(test, engine=ScriptedEngine(fail_at=1))


def test_the_engines_gauges_are_its_latest_and_its_counts_add_up() -> None:
    async def test(server: TestServer) -> None:
        for running in (3, 2):
            server.engine.say(
                StepOutput(
                    outputs=[],
                    stats=EngineStats(
                        num_running=running,
                        num_waiting=5,
                        num_kv_blocks_used=7,
                        num_adapter_pins=2,
                        num_adapters_resident=1,
                        num_preemptions=1,
                        num_cached_tokens=16,
                        num_running_tokens=99,
                        prefill_step_s=[0.1, 0.2],
                        decode_step_s=[0.01],
                        forward_s=[0.1, 0.1, 0.01],
                        sample_s=[0.001],
                    ),
                )
            )
        await server.generate("")  # lets the messages through
        samples = series((await server.http.get("/metrics")).text)
        assert (samples["loraplex_running"], samples["tgi_batch_current_size"]) == (2, 2)
        assert (samples["loraplex_waiting"], samples["tgi_queue_size"]) == (5, 5)
        assert (samples["loraplex_kv_blocks_used"], samples["loraplex_kv_blocks"]) == (7, 40)
        assert (samples["loraplex_adapter_pins"], samples["loraplex_adapters_resident"]) == (2, 1)
        assert (samples["loraplex_preemptions"], samples["loraplex_prefix_hit_tokens"]) == (2, 32)
        assert samples["tgi_batch_current_max_tokens"] == 99
        assert samples['tgi_batch_inference_count{method="prefill"}'] == 4
        assert samples['tgi_batch_inference_duration_count{method="decode"}'] == 2

    with_server(test)


def test_counters_are_typed_and_have_no_total_suffix() -> None:
    text = Metrics().render().decode()
    assert "# TYPE tgi_request_count counter\n" in text
    own = [line for line in text.replace("max_total_tokens", "").splitlines() if "vllm:" not in line]
    assert not any("_total" in line for line in own)
    assert "_created" not in text


def test_dashboards_of_lorax_and_vllm_find_their_series() -> None:
    async def test(server: TestServer) -> None:
        await server.generate("hi")
        server.engine.say(StepOutput(outputs=[], stats=EngineStats(num_prompt_tokens=5, num_preemptions=2)))
        await server.generate("")  # lets the message through
        text = (await server.http.get("/metrics")).text
        families = [family.name for family in text_string_to_metric_families(text)]
        assert len(families) == len(set(families))
        samples = series(text)
        model = 'model_name="tiny-base"'
        for ours, theirs in (
            ("tgi_request_count", "lorax_request_count"),
            ('tgi_request_duration_bucket{le="+Inf"}', 'lorax_request_duration_bucket{le="+Inf"}'),
            ("tgi_request_skipped_tokens_sum", "lorax_request_skipped_tokens_sum"),
            ("tgi_queue_size", "lorax_queue_length"),
            ("tgi_request_duration_sum", f"vllm:e2e_request_latency_seconds_sum{{{model}}}"),
            ('tgi_request_input_length_bucket{le="+Inf"}', f'vllm:request_prompt_tokens_bucket{{{model},le="+Inf"}}'),
            ("loraplex_prompt_tokens", f"vllm:prompt_tokens_total{{{model}}}"),
            ("loraplex_preemptions", f"vllm:num_preemptions_total{{{model}}}"),
            ("loraplex_waiting", f"vllm:num_requests_waiting{{{model}}}"),
        ):
            assert samples[theirs] == samples[ours], theirs
        assert samples[f"vllm:prompt_tokens_total{{{model}}}"] >= 5 and samples["lorax_request_count"] == 2
        assert "# TYPE vllm:e2e_request_latency_seconds histogram\n" in text

    with_server(test)


def test_adapter_labels_are_bounded() -> None:
    metrics = Metrics()
    for i in range(MAX_ADAPTER_LABELS + 50):
        for _ in range(2):
            metrics._counters.add_bounded("loraplex_adapter_requests", "adapter_id", f"a{i}")
    samples = series(metrics.render().decode())
    names = [name for name in samples if name.startswith("loraplex_adapter_requests")]
    assert len(names) == MAX_ADAPTER_LABELS + 1
    assert samples['loraplex_adapter_requests{adapter_id="other"}'] == 100
    assert samples['loraplex_adapter_requests{adapter_id="a0"}'] == 2


def test_an_adapters_name_cannot_break_a_scrape() -> None:
    metrics = Metrics()
    metrics._counters.add_bounded("loraplex_adapter_requests", "adapter_id", 'a"b\\c\nd')
    assert r'loraplex_adapter_requests{adapter_id="a\"b\\c\nd"} 1' in metrics.render().decode()
