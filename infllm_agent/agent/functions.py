"""Tools made from plain Python functions: their schemas, the check of their arguments, their results as text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python

from infllm_agent.errors import ConfigError
from infllm_agent.tools import ToolSpec

#: What a function of any kind may be: what it returns decides how it is run.
Function = Callable[..., Any]

#: The result of a tool that returns None, or writes nothing.
NO_OUTPUT = "(no output)"

_SECTION = re.compile(
    r"^[ \t]*(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):[ \t]*$", re.MULTILINE
)
_ARGUMENT = re.compile(r"^(\w+)[ \t]*(?:\([^)\n]*\))?:[ \t]*(.*(?:\n(?:[ \t]+.*)?)*)", re.M)


class StopAgent(Exception):
    """Raised by a tool to end the run; its message becomes the tool's result."""


class InvalidArguments(ValueError):
    """A model's arguments that the tool does not take; the message tells the model what to mend."""


class Tool:
    """A function that a model may call.

        def read_log(host: Literal["db-3", "web-1"], lines: int = 10) -> Iterator[str]:
            '''The latest lines of a host's log.

            Args:
                host: whose log.
            '''

    Functions need no ``Tool`` around them unless something is to be said about them. They may be sync, async,
    generators or async generators; what a generator yields is text, and is read by the model while the tool runs.

    Attributes:
        function: called with keyword arguments.
        spec: what the model is told.
        timeout: in seconds; None: the run's.
        repeatable: whether a call that an earlier process left without result may be made again.
    """  # noqa: D214 - the example has a docstring

    def __init__(
        self,
        function: Function,
        *,
        name: str | None = None,
        description: str | None = None,
        parameters: type[BaseModel] | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        repeatable: bool = True,
    ) -> None:
        """
        Args:
            name: None: the function's.
            description: None: its docstring, up to the section of the arguments.
            parameters: a pydantic model, whose fields are the arguments, or a JSON schema, by which the model is
                guided but nothing is converted; None: made from the signature.

        Raises:
            ConfigError: what cannot be a tool, or a time-out that is none.
            InvalidName: a name outside the alphabet of tools.
        """
        name = name or _name_of(function)
        if timeout is not None and not timeout > 0:
            raise ConfigError(f'tool "{name}": its timeout is {timeout}; give seconds above 0')
        text, arguments = read_docstring(inspect.getdoc(function) or "")
        self.function = function
        self.timeout = timeout
        self.repeatable = repeatable
        self._model: type[BaseModel] | None = None
        if isinstance(parameters, Mapping):
            schema = dict(parameters)
        else:
            self._model = parameters or _model_of(function, name)
            schema = _schema_of(self._model, name)
        for argument, its_text in arguments.items():
            if isinstance(property := schema.get("properties", {}).get(argument), dict):
                property.setdefault("description", its_text)
        self.spec = ToolSpec(name, text if description is None else description, schema)
        if parameters is not None:
            self._check_takes(self.spec.parameters["properties"])

    @property
    def name(self) -> str:
        return self.spec.name

    def validated(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them, converted by pydantic.

        Raises:
            InvalidArguments: naming each argument that is wrong, in words.
        """
        if self._model is None:
            return dict(arguments)
        try:
            valid = self._model.model_validate(arguments)
        except ValidationError as error:
            problems = [f"{_place(each['loc'])}: {each['msg']}" for each in error.errors(include_url=False)]
            raise InvalidArguments(
                f"the arguments of {self.name} are not valid. " + "; ".join(problems) + ". Mend them and call again."
            ) from None
        return {field.alias or key: getattr(valid, key) for key, field in self._model.model_fields.items()}

    def _check_takes(self, names: Iterable[str]) -> None:
        """Parameters that were given, not made from the signature, must fit it."""
        try:
            inspect.signature(self.function).bind(**dict.fromkeys(names))
        except TypeError as error:
            raise ConfigError(f'tool "{self.name}": its function does not take these parameters: {error}') from None


def as_tools(given: Iterable[Tool | Function]) -> dict[str, Tool]:
    """Tools by name, in their order. Raises ConfigError for what is none, and for two of one name."""
    tools: dict[str, Tool] = {}
    for each in given:
        tool = each if isinstance(each, Tool) else Tool(each)
        if tool.name in tools:
            raise ConfigError(f'two tools are named "{tool.name}": give one of them another name, Tool(..., name=...)')
        tools[tool.name] = tool
    return tools


def result_text(result: Any) -> str:
    """A tool's result as the model reads it: text as it is, None as ``NO_OUTPUT``, anything else as JSON.

    Raises TypeError for what has no JSON: bytes, and objects that pydantic does not know.
    """
    if isinstance(result, str):
        return result
    if result is None:
        return NO_OUTPUT
    if not isinstance(result, (bytes, bytearray, memoryview)):
        try:
            return json.dumps(to_jsonable_python(result), ensure_ascii=False)
        except (PydanticSerializationError, ValueError, RecursionError):
            pass
    raise TypeError(f"the tool returned {type(result).__name__}, which is neither text nor JSON")


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the whole, before its first section, and of each argument under "Args:"."""
    first, *sections = _SECTION.split(doc)
    arguments: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            body = inspect.cleandoc("\n" + body)
            arguments = {found[1]: " ".join(found[2].split()) for found in _ARGUMENT.finditer(body)}
    return first.strip(), arguments


def _name_of(function: Function) -> str:
    if not callable(function):
        raise ConfigError(f"a tool is a function or a Tool, not {type(function).__name__}: {function!r:.60}")
    name = getattr(function, "__name__", None)
    if name is None:
        raise ConfigError(f"{function!r:.60} has no name: give one, Tool(..., name=...)")
    if name == "<lambda>":
        raise ConfigError("a lambda has no name: define a function, or give one, Tool(..., name=...)")
    return str(name)


def _model_of(function: Function, name: str) -> type[BaseModel]:
    """The signature as a pydantic model. Fields have neutral names, so that an argument may be called ``schema``."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f'tool "{name}": its annotations cannot be read: {error}; define what they name at the top of the module'
        ) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f'tool "{name}" has no signature to read ({error}): give parameters=') from None
    fixed = function.keywords if isinstance(function, partial) else {}
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name in fixed:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f'tool "{name}": its argument "{parameter}" is {parameter.kind.description}; a model gives each '
                "argument by its name"
            )
        if parameter.annotation is parameter.empty:
            raise ConfigError(f'tool "{name}": its argument "{parameter.name}" has no annotation; say what type it has')
        _check_has_schema(parameter, name)
        default = ... if parameter.default is parameter.empty else parameter.default
        annotation: Any = parameter.annotation
        fields[f"argument_{len(fields)}"] = (Annotated[annotation, Field(alias=parameter.name)], default)
    try:
        # An argument that there is none of is a slip, of which the model must hear.
        return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    except (PydanticUserError, TypeError) as error:
        raise _no_schema(f'tool "{name}": no schema can be made from its signature', error) from None


def _check_has_schema(parameter: inspect.Parameter, name: str) -> None:
    try:
        TypeAdapter(parameter.annotation).json_schema()
    except (PydanticUserError, NameError, TypeError) as error:
        raise _no_schema(f'tool "{name}": its argument "{parameter}" has no JSON schema', error) from None


def _no_schema(what: str, error: Exception) -> ConfigError:
    return ConfigError(f"{what}: {str(error).strip().splitlines()[0]}")


class _Schema(GenerateJsonSchema):
    """JSON schemas without titles made from names, which tell a model nothing, and without what decoding cannot hold
    it to and pydantic mends: a set made from a list has everything once."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def set_schema(self, schema: Any) -> dict[str, Any]:
        return _without_unique(super().set_schema(schema))

    def frozenset_schema(self, schema: Any) -> dict[str, Any]:
        return _without_unique(super().frozenset_schema(schema))


def _without_unique(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "uniqueItems"}


def _schema_of(model: type[BaseModel], name: str) -> dict[str, Any]:
    try:
        schema = model.model_json_schema(schema_generator=_Schema)
    except PydanticUserError as error:
        raise _no_schema(f'tool "{name}": its parameters have no JSON schema', error) from None
    schema.pop("title", None)
    schema.pop("description", None)
    return schema


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "they"
