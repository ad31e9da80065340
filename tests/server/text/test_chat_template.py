"""The chat template: what transformers renders, from the files that models come with, and nothing that hangs."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from loraplex_server.errors import TemplateFailed
from loraplex_server.text import chat_template as module
from loraplex_server.text.chat_template import ChatTemplate, ChatTemplateError, Conversation

# The manners of well-known models, shortened.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""  # noqa: E501
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- message.tool_calls | tojson(indent=2) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
QWEN_3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {% generation %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- else %}
        {%- if loop.index0 > 100 %}{%- break %}{%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "qwen-3": QWEN_3}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": " Où est <b>l'or</b>? 😀\n"}
ASSISTANT = {"role": "assistant", "content": "<think>hm</think>\n\nUnder the palm.  "}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"a": "é<"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "last word": [USER, ASSISTANT],
}


def rendered(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    variables = options.pop("variables", {})
    return ChatTemplate(source, TOKENS).render(Conversation(messages=messages, variables=variables, **options))


def expected(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    texts, _ = render_jinja_template([messages], chat_template=source, **TOKENS, **options)
    return str(texts[0])


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("generates", [True, False])
def test_the_prompt_is_that_of_transformers(source: str, messages: list[dict[str, Any]], generates: bool) -> None:
    assert rendered(source, messages, add_generation_prompt=generates) == expected(
        source, messages, add_generation_prompt=generates
    )


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", ["Under", "Under ", " Under the\n\n", "CONTINUE"])
def test_a_final_message_is_continued_as_by_transformers(source: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    found = rendered(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert found == expected(source, messages, continue_final_message=True)
    assert found.rstrip().endswith(content.strip())


def test_variables_reach_the_template_as_in_transformers() -> None:
    found = rendered(QWEN_3, [USER], variables={"enable_thinking": False})
    assert found == expected(QWEN_3, [USER], add_generation_prompt=True, enable_thinking=False)
    assert found.endswith("</think>\n\n")
    assert "1 Jan 2026" in rendered(LLAMA_3, [USER], variables={"date_string": "1 Jan 2026"})


def test_variables_cannot_replace_the_messages() -> None:
    assert rendered("{{ messages[0].content }}", [USER], variables={"messages": []}) == USER["content"]


def test_tool_calls_are_plain_json_as_in_transformers() -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "é<"}]
    assert rendered(LLAMA_3, messages) == expected(LLAMA_3, messages, add_generation_prompt=True)


def test_the_date_is_there() -> None:
    assert rendered("{{ strftime_now('%Y') }}", [USER]).isdigit()


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        rendered(LLAMA_2, [USER, USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.x }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10_000_000 }}",
        "{{ [1] * 10_000_000 }}",
        "{{ 10 ** 10_000 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{{ range(10_000_000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str) -> None:
    with pytest.raises(TemplateFailed):
        rendered(source, [USER])


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDER_TIMEOUT_S", 0.05)
    loop = "{% for i in range(99999) %}"
    with pytest.raises(TemplateFailed, match="took longer"):
        rendered(f"{loop}{loop}{{% endfor %}}{{% endfor %}}", [USER])


def test_a_template_that_writes_too_much_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROMPT_CHARACTERS", 1000)
    with pytest.raises(TemplateFailed, match="more than 1000 characters"):
        rendered("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", [USER])


def test_a_final_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(TemplateFailed, match="does not show the final message"):
        rendered("{{ messages[0].content }}", [USER, ASSISTANT], continue_final_message=True)


def write(folder: Path, **files: Any) -> str:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_the_jinja_file_goes_before_the_json_file_and_that_before_the_tokenizers_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_config__json={"chat_template": "config {{ bos_token }}", "bos_token": "<s>"})
    empty = Conversation(messages=[USER], variables={})

    def text() -> str:
        template = ChatTemplate.load(folder)
        assert template is not None
        return template.render(empty)

    assert text() == "config <s>"
    write(tmp_path, chat_template__json={"chat_template": "json"})
    assert text() == "json"
    write(tmp_path, chat_template__jinja="jinja {{ bos_token }}")
    assert text() == "jinja <s>"


def test_the_named_settings_file_goes_before_all(tmp_path: Path) -> None:
    folder = write(tmp_path, chat_template__jinja="jinja")
    other = tmp_path / "other.json"
    token = {"content": "<e>", "special": True}
    other.write_text(json.dumps({"chat_template": "other {{ eos_token }}", "eos_token": token}))
    template = ChatTemplate.load(folder, str(other))
    assert template is not None and template.render(Conversation(messages=[USER], variables={})) == "other <e>"
    other.write_text("{}")
    template = ChatTemplate.load(folder, str(other))
    assert template is not None and template.render(Conversation(messages=[USER], variables={})) == "jinja"


def test_a_template_of_the_operators_own_goes_before_those(tmp_path: Path) -> None:
    folder = write(tmp_path, chat_template__jinja="jinja")
    own = tmp_path / "own.jinja"
    own.write_text("own")
    template = ChatTemplate.load(folder, None, str(own))
    assert template is not None and template.render(Conversation(messages=[USER], variables={})) == "own"
    with pytest.raises(ChatTemplateError, match=r"nowhere\.jinja' cannot be read"):
        ChatTemplate.load(folder, None, str(tmp_path / "nowhere.jinja"))


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    template = ChatTemplate.load(write(tmp_path, tokenizer_config__json={"chat_template": named}))
    assert template is not None and template.render(Conversation(messages=[USER], variables={})) == "yes"
    assert ChatTemplate.load(write(tmp_path, tokenizer_config__json={"chat_template": named[:1]})) is None


def test_a_model_may_have_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(str(tmp_path)) is None


@pytest.mark.parametrize("files", [{"chat_template__jinja": "{% if %}"}, {"chat_template__json": "{"}])
def test_a_broken_file_is_named(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match=r"does not compile|chat_template\.json"):
        ChatTemplate.load(write(tmp_path, **files))
