"""Tools from functions: the schema that the model sees, the arguments that the function gets."""

from __future__ import annotations

import datetime
import enum
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from pydantic import BaseModel, Field, validate_call
from typing_extensions import TypedDict

from infllm_agent.agent.functions import InvalidArguments, Tool, as_tools, read_docstring
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, InvalidName
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime
from infllm_agent.tools import ToolSpec

MEMORY = MemoryConfig(n_local=256, topk=8, candidates=16, max_cached_block=16)


class Level(enum.Enum):
    low = "low"
    high = "high"


class Host(BaseModel):
    """A machine."""

    name: str
    port: Annotated[int, Field(ge=1, le=65535, description="where it listens")] = 22


class Range(TypedDict):
    first: int
    last: int


@dataclass
class Point:
    x: int
    y: int = 0


class Client:
    def fetch(self, path: str, retries: int = 3) -> Any:
        return path, retries

    @classmethod
    def make(cls, host: str) -> Any:
        return cls.__name__, host

    @staticmethod
    def parse(text: str) -> Any:
        return text

    def __call__(self, text: str) -> Any:
        return text


def nothing() -> Any:
    return ()


def plain(host: str, lines: int = 10, follow: bool = False, share: float = 0.5) -> Any:
    return host, lines, follow, share


def keywords(*, level: Level, mode: Literal["a", "b"] = "a", since: datetime.datetime | None = None) -> Any:
    return level, mode, since


def nested(host: Host, others: list[Host] = [], by_name: dict[str, int] = {}) -> Any:  # noqa: B006
    return host, others, by_name


def shapes(span: Range, point: Point, pair: tuple[int, str], any_of: int | str, tags: set[str] | None = None) -> Any:
    return span, point, pair, any_of, tags


def bounded(text: Annotated[str, Field(max_length=5, description="short")], number: int = Field(3, ge=1, le=9)) -> Any:
    return text, number


def pydantics_own_names(schema: str, copy: int, model_config: bool, model_dump: str = "x", _private: int = 0) -> Any:
    return schema, copy, model_config, model_dump, _private


def old_style(limit: Optional[int] = None, *, anything: Any = None) -> Any:  # noqa: UP045
    return limit, anything


@functools.wraps(plain)
def wrapped(*arguments: Any, **named: Any) -> Any:
    return plain(*arguments, **named)


FUNCTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (nothing, {}),
    (plain, {"host": "x"}),
    (plain, {"host": "x", "lines": "7", "follow": "yes", "share": 1}),
    (keywords, {"level": "high"}),
    (keywords, {"level": "low", "mode": "b", "since": "2024-05-01T02:14:00Z"}),
    (nested, {"host": {"name": "db-3"}}),
    (nested, {"host": {"name": "a", "port": "80"}, "others": [{"name": "b"}], "by_name": {"x": "1"}}),
    (shapes, {"span": {"first": 1, "last": 2}, "point": {"x": 1}, "pair": [1, "a"], "any_of": "b", "tags": ["t"]}),
    (bounded, {"text": "short"}),
    (pydantics_own_names, {"schema": "s", "copy": 1, "model_config": True}),
    (old_style, {}),
    (wrapped, {"host": "x"}),
    (Client().fetch, {"path": "/"}),
    (Client.make, {"host": "x"}),
    (Client.parse, {"text": "x"}),
]


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS)
def test_a_function_gets_what_pydantic_would_give_it(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    tool = Tool(function)
    jsonschema.Draft202012Validator.check_schema(tool.spec.parameters)
    expected: Any = (
        bounded(arguments["text"], 3) if function is bounded else validate_call(_plain_function(function))(**arguments)
    )
    assert function(**tool.validated(arguments)) == expected
    with pytest.raises(InvalidArguments, match="bogus: Extra inputs"):
        tool.validated({**arguments, "bogus": 1})
    for name in tool.spec.parameters.get("required", []):
        with pytest.raises(InvalidArguments, match=f"{name}: Field required"):
            tool.validated({key: value for key, value in arguments.items() if key != name})


def _plain_function(function: Callable[..., Any]) -> Callable[..., Any]:
    return plain if function is wrapped else function


@pytest.fixture(scope="module")
def runtime(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel, one_thread: None
) -> Iterator[AgentRuntime]:
    with AgentRuntime(tmp_path_factory.mktemp("root"), tiny_model, MEMORY) as runtime:
        yield runtime


@pytest.mark.parametrize("function", {function.__name__: function for function, _ in FUNCTIONS}.values())
def test_a_forced_call_is_one_that_the_function_takes(runtime: AgentRuntime, function: Callable[..., Any]) -> None:
    """By the worst writer there is, a model of random weights."""
    tool = Tool(function)
    session = runtime.session(tool.name)
    session.append_user("Go.")
    reply = session.reply(
        tools=[tool.spec], tool_choice=tool.name, parallel_calls=False, max_tokens=300, temperature=1.0, seed=1
    )
    (call,) = reply.tool_calls
    jsonschema.validate(call.arguments, tool.spec.parameters)
    function(**tool.validated(call.arguments))


def test_what_the_model_sees() -> None:
    def read_log(
        host: Literal["db-3", "web-1"], lines: int = 10, level: Annotated[str, Field(description="own")] = ""
    ) -> None:
        """The latest lines of a host's log.

        Times are in UTC.

        Args:
            host: whose log, by its name: as in
                the inventory.

            lines (int, optional): how many.
            level: not this.

        Returns:
            Lines: each with its time.

        Raises:
            host: never.
        """

    assert Tool(read_log).spec == ToolSpec(
        "read_log",
        "The latest lines of a host's log.\n\nTimes are in UTC.",
        {
            "type": "object",
            "properties": {
                "host": {
                    "enum": ["db-3", "web-1"],
                    "type": "string",
                    "description": "whose log, by its name: as in the inventory.",
                },
                "lines": {"default": 10, "type": "integer", "description": "how many."},
                "level": {"default": "", "description": "own", "type": "string"},
            },
            "required": ["host"],
            "additionalProperties": False,
        },
    )


@pytest.mark.parametrize(
    ("doc", "description", "arguments"),
    [
        ("", "", {}),
        ("Does it.", "Does it.", {}),
        ("Does it.\n\nArgs:\n    a: one\n    b (int): two", "Does it.", {"a": "one", "b": "two"}),
        ("Args:\n  a:\n    below\n    it\n\nNote:\n  no: argument", "", {"a": "below it"}),
        ("Words: none.\n\nReturns:\n    x: y", "Words: none.", {}),
        ("Does it.\n\nParameters:\n    a: one (see b: two)", "Does it.", {"a": "one (see b: two)"}),
    ],
)
def test_docstrings(doc: str, description: str, arguments: dict[str, str]) -> None:
    assert read_docstring(doc) == (description, arguments)


def test_what_is_said_about_a_function_holds() -> None:
    tool = Tool(functools.partial(plain, lines=3), name="tail", description="Looks.", timeout=5)
    assert (tool.name, tool.spec.description, tool.timeout) == ("tail", "Looks.", 5)
    assert list(tool.spec.parameters["properties"]) == ["host", "follow", "share"]  # what is fixed is not the model's
    assert tool.function(**tool.validated({"host": "x"})) == ("x", 3, False, 0.5)

    class Arguments(BaseModel):
        host: str
        lines: int = Field(5, description="how many")

    tool = Tool(plain, parameters=Arguments)
    assert tool.spec.parameters["properties"]["lines"] == {"default": 5, "description": "how many", "type": "integer"}
    assert tool.validated({"host": "x"}) == {"host": "x", "lines": 5}

    tool = Tool(lambda **named: json.dumps(named), name="echo", parameters={"properties": {"a": {"type": "integer"}}})
    assert tool.spec.parameters == {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert tool.validated({"a": "not converted"}) == {"a": "not converted"}
    assert Tool(Client(), name="call").validated({"text": "x"}) == {"text": "x"}


def positional_only(a: int, /) -> None: ...
def variable(*hosts: str) -> None: ...
def named(**hosts: str) -> None: ...
def unannotated(host, lines: int) -> None: ...
def unknown(host: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def callback(then: Callable[[], None]) -> None: ...
def foreign(client: Client) -> None: ...
def infinite(limit: float = float("inf")) -> None: ...


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tool(positional_only), 'tool "positional_only": its argument "a: int" is positional-only'),
        (lambda: Tool(variable), r'"\*hosts: str" is variadic positional'),
        (lambda: Tool(named), r'"\*\*hosts: str" is variadic keyword'),
        (lambda: Tool(unannotated), 'argument "host" has no annotation'),
        (lambda: Tool(unknown), "'Nowhere' is not defined"),
        (lambda: Tool(callback), 'argument "then: .*" has no JSON schema'),
        (lambda: Tool(foreign), 'argument "client: .*" has no JSON schema'),
        (lambda: Tool(infinite), "inf is no JSON number"),
        (lambda: Tool(lambda: ""), "a lambda has no name"),
        (lambda: Tool(functools.partial(plain)), "has no name"),
        (lambda: Tool("plain"), "not str"),  # type: ignore[arg-type]
        (lambda: Tool(len), "positional-only"),
        (lambda: Tool(plain, timeout=0), "timeout is 0"),
        (lambda: Tool(plain, timeout=float("nan")), "timeout is nan"),
        (lambda: Tool(plain, parameters={"type": "array"}), "schema of an object"),
        (
            lambda: Tool(plain, parameters={"properties": {"host": {}, "hosts": {}}}),
            "unexpected keyword argument 'hosts'",
        ),
        (lambda: Tool(plain, parameters={"properties": {"lines": {}}}), "missing a required argument: 'host'"),
        (lambda: as_tools([plain, nothing, Tool(nothing, name="plain")]), 'two tools are named "plain"'),
        (lambda: as_tools([plain, 3]), "not int: 3"),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_a_tool_is_refused_by_name(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_names_have_their_alphabet() -> None:
    with pytest.raises(InvalidName, match="not a name"):
        Tool(plain, name="not a name")
