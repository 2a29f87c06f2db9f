"""What the commands can be told: options that several of them share, declared once.

A command takes a group of options as one parameter; ``takes_options`` spreads the group out for typer and puts it
together again. Settings become options by their fields, so a new field in ``config`` is an option at once.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from pydantic.fields import FieldInfo

from infllm_agent.config import MemoryConfig, RuntimeConfig, SamplingConfig, Settings, TraceMode, default_root
from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.platform.logs import LogFormat

Role = Literal["system", "user", "assistant", "observation", "tool"]  # chat.Role, which would load transformers

SessionName = Annotated[str, typer.Argument(metavar="SESSION", help="The session's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, and nothing else.")]

Logging = Annotated[
    LogFormat | None,
    typer.Option("--log", envvar="INFLLM_LOG", help="Log to stderr what happens, without texts.", show_default=False),
]

Tracing = Annotated[
    TraceMode,
    typer.Option(
        "--trace", help="Keep what answers attend to, for inspect: of some tokens (sampled), all of them (on), or off."
    ),
]


def _expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))


Root = Annotated[
    Path,
    typer.Option(
        "--root",
        help="The folder that holds the sessions.",
        default_factory=default_root,
        show_default="$INFLLM_ROOT, or ~/.local/share/infllm-agent",
        callback=_expanded,
    ),
]


BucketUrl = Annotated[
    str, typer.Option("--bucket", metavar="URL", help="An object store, such as s3://bucket/sessions.")
]


@dataclass(frozen=True)
class RuntimeOptions:
    """Which sessions, and which model to load."""

    root: Root
    model: Annotated[str, typer.Option(help="A packaged alias, a local folder, or a hub id.")] = "smollm2"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; int8: weights in 8 bits.")] = "auto"
    host_budget: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most host memory for blocks, such as 2GB.", show_default="about 1GiB"),
    ] = None
    disk_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Most bytes under the root.", show_default="none")
    ] = None

    def allowed(self, **settings: Any) -> RuntimeConfig:
        """What the runtime may take. Raises ConfigError."""
        return RuntimeConfig(host_budget=self.host_budget, disk_budget=self.disk_budget, **settings)


@dataclass(frozen=True)
class _Given:
    """Marks a dict parameter: one option for each field of ``settings``; the dict has those that were given."""

    settings: type[Settings]
    panel: str

    def options(self) -> dict[str, Any]:
        return {name: self._option(name, field) for name, field in self.settings.model_fields.items()}

    def _option(self, name: str, field: FieldInfo) -> Any:
        kind = field.annotation
        several = kind == tuple[str, ...]
        lowest = next((rule.ge for rule in field.metadata if hasattr(rule, "ge")), None)
        default = "" if field.default in (None, ()) else f"(default {field.default})"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=" ".join(filter(None, [field.description, "May be repeated." if several else "", default])),
            min=lowest,
            show_default=False,
            rich_help_panel=self.panel,
        )
        return Annotated[list[str] | None if several else kind | None, option]  # type: ignore[operator]


Memory = Annotated[
    dict[str, Any],
    _Given(MemoryConfig, "Memory (an existing session keeps its own)"),
]
Sampling = Annotated[dict[str, Any], _Given(SamplingConfig, "Sampling")]
Server = Annotated[dict[str, Any], _Given(ServerConfig, "Server")]


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command have parameters that stand for several options: an option dataclass, ``Memory``, ``Sampling``."""
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[list[str], Callable[..., Any]]] = {}
    for parameter in signature.parameters.values():
        members, build = _members(parameter)
        parameters += [member.replace(kind=inspect.Parameter.KEYWORD_ONLY) for member in members]
        if build is not None:
            groups[parameter.name] = ([member.name for member in members], build)

    def command(**given: Any) -> None:
        for name, (members, build) in groups.items():
            given[name] = build(**{member: given.pop(member) for member in members})
        function(**given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _members(parameter: inspect.Parameter) -> tuple[list[inspect.Parameter], Callable[..., Any] | None]:
    """The options that a parameter stands for and what makes its value of theirs; itself and None if just itself."""
    kind = parameter.annotation
    mark = next((mark for mark in get_args(kind)[1:] if isinstance(mark, _Given)), None)
    if mark is not None:
        return [parameter.replace(name=n, annotation=o, default=None) for n, o in mark.options().items()], _only_given
    if not is_dataclass(kind):
        return [parameter], None
    hints = get_type_hints(kind, include_extras=True)
    members = [
        parameter.replace(
            name=field.name,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(kind)
    ]
    return members, kind if isinstance(kind, type) else None


def _only_given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [], ())}
