"""The command line: serve (also without the word), demo, download, adapters check, env."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

import loraplex
from loraplex import demo, flags
from loraplex.console import Console
from loraplex.flags import Settings
from loraplex.foreign_flags import spread_lora_modules
from loraplex.gpus import find_gpus
from loraplex.launch_error import LaunchError
from loraplex.open_files import raise_open_files
from loraplex.plan import check_served, make_plan
from loraplex.resolve import check_address, check_state, hub_access, resolve
from loraplex.supervisor import Supervisor
from loraplex_server import log
from loraplex_server.machine import look_at_machine

# A stop that was asked for while files are still coming in takes at most this long.
STOP_DURING_START_S = 2.0
USAGE_EXIT_CODE = 2


class _StopRequested(BaseException):
    """A signal to stop came before there were children to stop."""


class _DefaultToServe(click.Group):
    """A group whose command `serve` may be left out, as with text-generation-launcher."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if not args or (args[0].startswith("-") and args[0] not in own):
            args = ["serve", *args]
        return super().parse_args(ctx, args)


def _report_environment(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from loraplex.environment import report  # asks nvidia-smi and package metadata: seldom needed

        click.echo(report())
        context.exit()


_ENV_FLAG = click.Option(
    ["--env", "-e"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_report_environment,
    help="print a report of this machine and its packages, and exit",
)


@click.group(cls=_DefaultToServe, no_args_is_help=False)
@click.version_option(loraplex.__version__, prog_name="loraplex")
def cli() -> None:
    """One base model, many LoRA adapters, one server. `loraplex serve --help` lists every flag."""


def _serve(**_: Any) -> int:
    """Serve a base model and its adapters. MODEL, as vLLM has it, is another way to give --model-id."""
    context = click.get_current_context()
    model = context.params.pop("model")
    if model is not None:
        if context.get_parameter_source("model_id") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"two models are given: {model} and --model-id {context.params['model_id']}")
        context.params["model_id"] = model
    return _run_server(flags.settings_from(context))


def _demo(**values: Any) -> int:
    """Serve a small chat model with three example adapters, on 127.0.0.1; takes the flags of serve."""
    context = click.get_current_context()
    cache = values.pop("demo_cache")
    context.params.pop("demo_cache")
    if context.params["model_id"]:
        raise click.UsageError("demo serves its own model; use 'loraplex serve' with --model-id")
    if context.get_parameter_source("hostname") is not ParameterSource.COMMANDLINE:
        context.params["hostname"] = "127.0.0.1"
    settings = flags.settings_from(context)
    return _run_server(settings, demo_cache=Path(cache) if cache else demo.default_cache())


_CACHE_OPTION = click.Option(
    ["--demo-cache"], envvar="DEMO_CACHE", type=click.Path(file_okay=False), help="folder for the converted demo model"
)
_SERVE_OPTIONS = [*flags.options(), _ENV_FLAG]
_MODEL = click.Argument(["model"], required=False)
cli.add_command(click.Command("serve", callback=_serve, params=[_MODEL, *_SERVE_OPTIONS], help=_serve.__doc__))
cli.add_command(click.Command("demo", callback=_demo, params=[*_SERVE_OPTIONS, _CACHE_OPTION], help=_demo.__doc__))


def _run_server(settings: Settings, demo_cache: Path | None = None) -> int:
    api = settings.serve.api
    log.set_up("launcher", json_output=api.json_output, level=api.log_level)
    with Console(bars=sys.stderr.isatty() and not api.json_output) as console:
        for warning in settings.warnings:
            console.warning(warning)
        try:
            with _stopping_early():
                check_address(api)
                check_state(settings)
                if demo_cache is not None:
                    settings = _demo_settings(settings, demo.prepare(demo_cache, console.line), console)
                check_served(settings)
                facts = resolve(settings, progress=console.has_bars)
                plan = make_plan(
                    settings,
                    facts,
                    look_at_machine(),
                    openmp_set=flags.openmp_variables(),
                    gpus=find_gpus(),
                )
        except LaunchError as error:
            console.error(str(error))
            return 1
        except _StopRequested:
            console.line("stopped before the start was complete")
            return 0
        for line in plan.summary:
            console.line(line)
        if (few_files := raise_open_files()) is not None:
            console.warning(few_files)
        return Supervisor(plan, console).run()


def _demo_settings(settings: Settings, model_folder: Path, console: Console) -> Settings:
    launch = replace(
        settings.launch,
        model_id=str(model_folder),
        served_model_name=settings.launch.served_model_name or demo.MODEL_NAME,
    )
    if not launch.lora_adapters:
        launch = replace(launch, lora_adapters=demo.example_adapters())
        if not launch.lora_adapters:
            console.warning(
                "no example adapters here, serving the base model alone: they lie in examples/adapters of the "
                "repository; give them with --lora-adapters name=path"
            )
    return replace(settings, launch=launch)


@contextmanager
def _stopping_early() -> Iterator[None]:
    """Let a signal end downloads and conversions, whatever thread is still busy with them."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Threads of a download that end later than this are not waited for.
        timer = threading.Timer(STOP_DURING_START_S, os._exit, (0,))
        timer.daemon = True
        timer.start()
        raise _StopRequested

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _download(**_: Any) -> int:
    """Download a base model and adapters into the hub cache, check them, and print where they lie."""
    settings = flags.settings_from(click.get_current_context())
    log.set_up("launcher", level=settings.serve.api.log_level)
    check_served(settings)
    facts = resolve(settings, progress=sys.stderr.isatty())
    click.echo(f"{facts.model_id}\t{facts.path}")
    for adapter in facts.adapters:
        click.echo(f"{adapter.adapter_id}\t{adapter.path}")
    return 0


cli.add_command(click.Command("download", callback=_download, params=flags.options(), help=_download.__doc__))


@cli.command()
def env() -> None:
    """Print a report of this machine and its packages."""
    from loraplex.environment import report

    click.echo(report())


@cli.group()
def adapters() -> None:
    """Look at adapters without serving them."""


def _check(path: str, **_: Any) -> int:
    """Say whether the adapter PATH (a folder or a hub id) can be served on --model-id, and why not or what it is."""
    from loraplex.adapter_check import check  # brings the reading of adapters, which no other command needs so early

    context = click.get_current_context()
    context.params.pop("path")
    settings = flags.settings_from(context)
    check_served(settings)
    fits, lines = check(path, settings, hub_access(settings.launch))
    for line in lines:
        click.echo(line)
    return 0 if fits else 1


adapters.add_command(
    click.Command("check", callback=_check, params=[click.Argument(["path"]), *flags.options()], help=_check.__doc__)
)


@adapters.command("convert")
@click.argument("folder")
@click.argument("new_folder")
def convert(folder: str, new_folder: str) -> None:
    """Write an AdaLoRA or MLX adapter, or one with pickled weights, to NEW_FOLDER as PEFT LoRA."""
    # Brings torch, which nothing else on the command line needs.
    from loraplex_models.adapters.convert import convert_adapter
    from loraplex_models.adapters.manifest import ManifestError

    try:
        click.echo(convert_adapter(folder, new_folder))
    except ManifestError as error:
        raise LaunchError(f"adapter '{folder}': {error}") from None


def _usage_message(error: click.UsageError) -> str:
    """One line: what is wrong, where it came from, and the nearest real name."""
    context = error.ctx
    if isinstance(error, click.NoSuchOption) and context is not None:
        names = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        near = get_close_matches(error.option_name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"'{context.command_path} --help' lists the flags"
        return f"unknown flag {error.option_name}: {hint}"
    message = " ".join(error.format_message().split())
    parameter = getattr(error, "param", None)
    if context is not None and parameter is not None and parameter.name:
        source = context.get_parameter_source(parameter.name)
        if source is ParameterSource.ENVIRONMENT:
            message += f" (from the environment variable {flags.variable_of(parameter)})"
    return message


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code; an error is one line on stderr."""
    try:
        code = cli.main(spread_lora_modules(sys.argv[1:] if args is None else args), standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"error: {_usage_message(error)}", err=True)
        code = USAGE_EXIT_CODE
    except LaunchError as error:
        click.echo(f"error: {error}", err=True)
        code = 1
    except (click.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    sys.exit(code)
