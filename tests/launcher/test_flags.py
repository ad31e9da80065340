import socket

import click
import pytest

from loraplex import flags
from loraplex.flags import Settings
from loraplex.foreign_flags import FOREIGN_VARIABLES, IGNORED, IgnoredFlag, spread_lora_modules

# Every flag that a drop-in for TGI takes (its launcher's list), with a value where it needs one.
TGI_FLAGS = {
    "--model-id": "org/model",
    "--revision": "main",
    "--validation-workers": "2",
    "--sharded": "false",
    "--num-shard": "1",
    "--quantize": "gptq",
    "--speculate": "2",
    "--dtype": "bfloat16",
    "--kv-cache-dtype": "fp8_e5m2",
    "--trust-remote-code": None,
    "--max-concurrent-requests": "128",
    "--max-best-of": "2",
    "--max-stop-sequences": "4",
    "--max-top-n-tokens": "5",
    "--max-input-tokens": "100",
    "--max-input-length": "100",
    "--max-total-tokens": "200",
    "--waiting-served-ratio": "0.3",
    "--max-batch-prefill-tokens": "4096",
    "--max-batch-total-tokens": "4096",
    "--max-waiting-tokens": "20",
    "--max-batch-size": "8",
    "--cuda-graphs": "1,2,4",
    "--hostname": "0.0.0.0",
    "--port": "8080",
    "-p": "8080",
    "--prometheus-port": "9000",
    "--shard-uds-path": "somewhere",
    "--master-addr": "localhost",
    "--master-port": "29500",
    "--huggingface-hub-cache": "cache",
    "--weights-cache-override": "weights",
    "--disable-custom-kernels": None,
    "--cuda-memory-fraction": "0.9",
    "--rope-scaling": "linear",
    "--rope-factor": "2.0",
    "--json-output": None,
    "--otlp-endpoint": "collector:4317",
    "--otlp-service-name": "service",
    "--cors-allow-origin": "https://a.example",
    "--api-key": "secret",
    "--watermark-gamma": "0.5",
    "--watermark-delta": "2.0",
    "--ngrok-authtoken": "token",
    "--ngrok-edge": "edge",
    "--tokenizer-config-path": "tokenizer_config.json",
    "--disable-grammar-support": None,
    "--max-client-batch-size": "4",
    "--lora-adapters": "a/b",
    "--usage-stats": "on",
    "--payload-limit": "2000000",
    "--enable-prefill-logprobs": None,
    "--graceful-termination-timeout": "90",
    "-g": "90",
    "--disable-usage-stats": None,
    "--disable-crash-reports": None,
    "--max-image-fetch-size": "1073741824",
}
WITHOUT_VARIABLE = {"-p", "-g"}


def settings_of(*args: str) -> Settings:
    command = click.Command("serve", params=flags.options())
    with command.make_context("serve", spread_lora_modules(list(args))) as context:
        return flags.settings_from(context)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's own environment decides, not the machine's."""
    command = click.Command("serve", params=flags.options())
    for parameter in command.params:
        if isinstance(parameter.envvar, str):
            monkeypatch.delenv(parameter.envvar, raising=False)
    for name in (
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "VLLM_API_KEY",
        *FOREIGN_VARIABLES.values(),
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("flag", TGI_FLAGS)
def test_every_flag_of_tgi_is_taken(flag: str) -> None:
    value = TGI_FLAGS[flag]
    settings_of(flag, *([value] if value is not None else []))


@pytest.mark.parametrize("flag", sorted(TGI_FLAGS.keys() - WITHOUT_VARIABLE))
def test_every_flag_of_tgi_is_taken_from_the_environment(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = TGI_FLAGS[flag]
    by_flag = settings_of(flag, *([value] if value is not None else []))
    monkeypatch.setenv(flag[2:].replace("-", "_").upper(), value or "true")
    assert settings_of() == by_flag


def test_the_defaults_are_tgis() -> None:
    api = settings_of().serve.api
    assert (api.hostname, api.port, api.max_concurrent_requests) == ("0.0.0.0", 3000, 128)
    assert (api.max_best_of, api.max_stop_sequences, api.max_top_n_tokens, api.max_client_batch_size) == (2, 4, 5, 4)
    assert (api.payload_limit, api.graceful_termination_timeout, api.validation_workers) == (2_000_000, 90, 2)


def test_no_flag_gives_no_warning() -> None:
    assert settings_of("--model-id", "m").warnings == ()


@pytest.mark.parametrize("ignored", IGNORED, ids=lambda ignored: ignored.flag)
def test_a_flag_without_effect_is_answered_with_its_reason(ignored: IgnoredFlag) -> None:
    args = [ignored.flag, "1"] if ignored.takes_value else [ignored.flag]
    if ignored.flag == "--ngrok":
        args += ["--ngrok-authtoken", "t", "--ngrok-edge", "e"]
    assert f"{ignored.flag} has no effect: {ignored.reason}" in settings_of(*args).warnings


def test_a_switch_that_is_false_in_the_environment_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "false")
    assert settings_of().warnings == ()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True), ("0", False)])
def test_a_switch_reads_true_and_false_from_the_environment(
    text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSON_OUTPUT", text)
    monkeypatch.setenv("PREFIX_CACHING", text)
    settings = settings_of()
    assert settings.serve.api.json_output is value
    assert settings.serve.engine.prefix_caching is value


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "80")
    assert settings_of().serve.api.port == 80
    assert settings_of("--port", "8080").serve.api.port == 8080


def test_sagemakers_variables_are_read_where_ours_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_MODEL_ID": "org/m", "HF_MODEL_REVISION": "r", "SM_NUM_GPUS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_MODEL_QUANTIZE", "gptq")
    launch, engine = settings_of().launch, settings_of().serve.engine
    assert (launch.model_id, launch.revision, launch.num_shard, engine.quantize) == ("org/m", "r", 2, "gptq")
    monkeypatch.setenv("MODEL_ID", "org/other")
    assert settings_of().launch.model_id == "org/other"
    monkeypatch.setenv("SM_NUM_GPUS", "many")
    with pytest.raises(click.BadParameter) as wrong:
        settings_of()
    assert wrong.value.param is not None and flags.variable_of(wrong.value.param) == "SM_NUM_GPUS"


def test_the_address_of_a_kubernetes_service_is_not_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "tcp://10.0.0.1:80")
    settings = settings_of()
    assert settings.serve.api.port == 3000
    assert "PORT=tcp://10.0.0.1:80 is ignored" in settings.warnings[0]


def test_a_containers_name_is_not_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "3f2a91c0")
    settings = settings_of()
    assert settings.serve.api.hostname == "0.0.0.0"
    assert "3f2a91c0" in settings.warnings[0]
    monkeypatch.setattr(socket, "gethostname", lambda: "3f2a91c0")
    settings = settings_of()
    assert settings.serve.api.hostname == "0.0.0.0"
    assert settings.warnings == ()


@pytest.mark.parametrize(("given", "taken"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("localhost", "127.0.0.1")])
def test_an_address_is_taken_as_it_is(given: str, taken: str) -> None:
    settings = settings_of("--hostname", given)
    assert settings.serve.api.hostname == taken
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--max-input-tokens", "10", "--max-total-tokens", "10"], "--max-total-tokens"),
        (["--max-input-length", "10", "--max-total-tokens", "5"], "--max-total-tokens"),
        (["--max-input-tokens", "10", "--max-input-length", "10"], "old name"),
        (["--max-batch-total-tokens", "9", "--max-total-tokens", "10"], "--max-batch-total-tokens"),
        (["--sharded", "true", "--num-shard", "1"], "--num-shard"),
        (["--num-shard", "0"], "--num-shard"),
        (["--validation-workers", "0"], "--validation-workers"),
        (["--ngrok"], "--ngrok-authtoken"),
        (["--port", "70000"], "--port"),
        (["--dtype", "float8"], "--dtype"),
        (["--adapter-state", "a", "--adapter-cache", "b"], "--adapter-cache"),
    ],
)
def test_contradictory_or_impossible_settings_are_refused(args: list[str], named: str) -> None:
    with pytest.raises(click.UsageError) as refusal:
        settings_of(*args)
    assert named in refusal.value.format_message()


@pytest.mark.parametrize(
    "args",
    [
        ["--max-input-tokens", "9", "--max-total-tokens", "10"],
        ["--max-batch-total-tokens", "10", "--max-total-tokens", "10"],
        ["--port", "65535"],
    ],
)
def test_settings_at_their_limit_are_taken(args: list[str]) -> None:
    settings_of(*args)


def test_the_old_name_of_the_input_limit_means_the_same() -> None:
    assert settings_of("--max-input-length", "7").serve.engine.max_input_tokens == 7


def test_names_of_vllm_mean_our_settings() -> None:
    settings = settings_of(
        *["--model", "m", "--host", "127.0.0.1", "--served-model-name", "n", "--max-loras", "3", "--enable-lora"],
        *["--max-lora-rank", "64", "--lora-modules", "a=/x", "b=/y", "--port", "1234"],
    )
    assert settings.launch.model_id == "m"
    assert settings.launch.served_model_name == "n"
    assert settings.launch.lora_adapters == ("a=/x", "b=/y")
    assert settings.serve.api.port == 1234
    assert settings.serve.engine.adapters.max_resident_adapters == 3
    assert settings.serve.engine.adapters.max_lora_rank == 64
    assert len(settings.warnings) == 1  # --enable-lora


def test_more_names_of_vllm_mean_our_settings() -> None:
    settings = settings_of(
        *["--model", "m", "-tp", "2", "--gpu-memory-utilization", "0.9", "--quantization", "awq"],
        *["--download-dir", "/cache", "--no-enable-prefix-caching", "--chat-template", "/t.jinja"],
    )
    assert (settings.launch.num_shard, settings.launch.huggingface_hub_cache) == (2, "/cache")
    assert settings.serve.engine.cuda_memory_fraction == 0.9 and settings.serve.engine.quantize == "awq"
    assert not settings.serve.engine.prefix_caching and settings.serve.api.chat_template == "/t.jinja"
    assert settings_of("--no-prefix-caching", "--enable-prefix-caching").serve.engine.prefix_caching
    assert settings.warnings == ()


def test_vllms_variable_of_the_key_closes_the_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert settings_of("--model-id", "m").serve.api.api_key == ("secret",)
    assert settings_of("--model-id", "m", "--api-key", "other").serve.api.api_key == ("other",)


def test_flags_without_effect_that_are_not_tgis_are_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for ignored in IGNORED:
        if not ignored.is_read:
            monkeypatch.setenv(ignored.flag[2:].replace("-", "_").upper(), "anything")
    assert settings_of("--model-id", "m").warnings == ()


@pytest.mark.parametrize(
    "args",
    [
        ("--lora-modules", '{"name": "a", "path": "/x", "base_model_name": "m"}', "b=/y"),
        ('--lora-modules={"path": "/x", "name": "a"}', "b=/y"),
        ("--lora-paths", "a=/x", '{"lora_name": "b", "lora_path": "/y", "pinned": true}'),
        ("--preloaded-adapter-ids", "a=/x", "--preloaded-adapter-ids", "b=/y"),
    ],
)
def test_other_servers_ways_to_name_adapters_are_understood(args: tuple[str, ...]) -> None:
    settings = settings_of("--model", "m", *args, "--port", "80")
    assert (settings.launch.lora_adapters, settings.serve.api.port) == (("a=/x", "b=/y"), 80)


def test_lists_are_repeated_as_flags_and_separated_by_commas_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("--api-key", "a", "--api-key", "b").serve.api.api_key == ("a", "b")
    monkeypatch.setenv("LORA_ADAPTERS", "a/b,n=/p")
    monkeypatch.setenv("CORS_ALLOW_ORIGIN", "https://a,https://b")
    monkeypatch.setenv("API_KEY", "one, key")
    settings = settings_of()
    assert settings.launch.lora_adapters == ("a/b", "n=/p")
    assert settings.serve.api.cors_allow_origin == ("https://a", "https://b")
    assert settings.serve.api.api_key == ("one, key",)


def test_a_variable_that_is_almost_one_of_ours_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_INPUT_TOKEN", "5")
    monkeypatch.setenv("MAX_SOMETHING_ELSE", "5")
    (warning,) = settings_of().warnings
    assert "MAX_INPUT_TOKENS" in warning


def test_the_hubs_own_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", "/data")
    launch = settings_of().launch
    assert (launch.hub_token, launch.hub_endpoint) == ("secret", "http://127.0.0.1:9")
    assert launch.huggingface_hub_cache == "/data/hub"
    assert settings_of("--huggingface-hub-cache", "/c").launch.huggingface_hub_cache == "/c"


def test_no_two_settings_share_a_name() -> None:
    names = [field.name for group in flags.GROUPS for field in flags.setting_fields(group)]
    assert len(names) == len(set(names))


def test_openmp_settings_of_the_user_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    assert not flags.openmp_variables()
    monkeypatch.setattr("os.environ", {"GOMP_SPINCOUNT": "0", "HOME": "/"})
    assert flags.openmp_variables() == {"GOMP_SPINCOUNT"}
