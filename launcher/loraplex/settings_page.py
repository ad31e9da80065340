"""`python -m loraplex.settings_page [--check]`: write docs/settings.md from the settings, or say that it is stale."""

import sys
from pathlib import Path

from loraplex.flags import GROUPS, SettingField, setting_fields
from loraplex.foreign_flags import ALIASES, FOREIGN_VARIABLES, IGNORED, NOT_YET

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Written by `python -m loraplex.settings_page` from server/loraplex_server/config.py: change it there. -->

Every setting of `loraplex serve` is a flag and an environment variable; the flag wins. A switch takes no value on the
command line and `true` or `false` in the environment. A flag that is not known ends the start, with the nearest name
that is. `-` as a default means: not set. A list is repeated on the command line and separated by commas in the
environment (`API_KEY` is one key).
"""
# Variables without a flag: secrets, which a command line would show to everybody, and what other programs set too.
VARIABLES = (
    ("`HF_TOKEN` (also `HUGGING_FACE_HUB_TOKEN`, `HF_API_TOKEN`)", "token for the hub"),
    ("`HF_ENDPOINT`", "address of the hub"),
    ("`HF_HUB_CACHE`, `HF_HOME`", "folder of downloads, unless `--huggingface-hub-cache` is given"),
    ("`HF_HUB_OFFLINE`", "1: take downloads from the cache only"),
    ("`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`", "credentials of the source s3"),
    ("`S3_ENDPOINT_URL`, `R2_ACCOUNT_ID`", "another server that speaks S3"),
    ("`PREDIBASE_MODEL_BUCKET`, `PREDIBASE_MODEL_FOLDER`", "where names of the source s3 without a bucket lie"),
    ("`PREDIBASE_GATEWAY_ENDPOINT`", "address of the source pbase"),
    ("`VLLM_ALLOW_RUNTIME_LORA_UPDATING`", "1: the same as `--allow-runtime-adapters`"),
    ("`VLLM_API_KEY`", "the same as `--api-key`, where that is not given"),
    ("`LORAX_USE_GLOBAL_HF_TOKEN`", "1: the same as `--share-hub-token`"),
    ("`OMP_*`, `GOMP_*`", "OpenMP settings of the engine; what is set stays"),
    ("`XDG_CACHE_HOME`", "where the demo keeps its model, and adapters lie without `--adapter-cache` (`~/.cache`)"),
)


def _default(field: SettingField) -> str:
    match field.default:
        case None | ():
            return "-"
        case bool(value):
            return "on" if value else "off"
        case value:
            return f"`{value}`"


def _row(field: SettingField) -> str:
    flag = field.flag
    if field.kind is bool and not field.optional and field.default:
        flag = f"{flag}, --no-{flag[2:]}"
    flags = ", ".join(f"`{name}`" for name in (flag, *ALIASES.get(field.name, ())))
    meaning = field.help + (f" ({', '.join(field.choices)})" if field.choices else "")
    if field.name in NOT_YET:
        meaning += f"; no effect: {NOT_YET[field.name]}"
    variables = f"`{field.env_name}`"
    if field.name in FOREIGN_VARIABLES:
        variables += f", `{FOREIGN_VARIABLES[field.name]}`"
    return f"| {flags} | {variables} | {_default(field)} | {meaning} |"


def page() -> str:
    """The whole page as Markdown."""
    lines = [INTRODUCTION]
    for group in GROUPS:
        lines += [
            f"## {(group.__doc__ or '').strip()}",
            "",
            "| flag | variable | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [_row(field) for field in setting_fields(group)]
        lines.append("")
    lines += [
        "`--max-input-length` (`MAX_INPUT_LENGTH`) is the old name of `--max-input-tokens`; giving both is an error.",
        "",
        "## Variables without a flag",
        "",
        "| variable | meaning |",
        "|---|---|",
        *(f"| {names} | {meaning} |" for names, meaning in VARIABLES),
        "",
        "## Accepted without effect",
        "",
        "Flags of TGI, LoRAX and vLLM that have no meaning here. Each is answered with one warning line.",
        "",
        "| flag | why |",
        "|---|---|",
        *(f"| `{ignored.flag}` | {ignored.reason} |" for ignored in IGNORED),
    ]
    return "\n".join(lines) + "\n"


def main(args: list[str]) -> int:
    """Write the page; with --check only compare, and return 1 when it is stale."""
    if "--check" not in args:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/settings.md is stale: run 'python -m loraplex.settings_page'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
