"""How docstrings are read for the API reference: an extension of griffe, which mkdocstrings loads.

Settings describe their fields in ``Field(default, description=...)``; and a ``Raises`` section may name several errors
in one line. Here both are brought into the form that the reference shows: an error that is only named is described by
its own docstring.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

from infllm_agent import errors
from infllm_agent.storage import catalog

#: The beginning of an entry that says why.
ENTRY = re.compile(r"    [\w, ]+:")
#: A name, and what stands in brackets behind it.
ERROR = re.compile(r"(\w+)(?: \((.*?)\))?[,.]")


class Docstrings(griffe.Extension):
    """Fields and errors as the reference shows them."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Add ``integrations``, which griffe passes over because it has no ``__init__.py``."""
        folder = pkg.filepath.parent / "integrations"
        common: Any = {
            "extensions": loader.extensions,
            "lines_collection": loader.lines_collection,
            "modules_collection": loader.modules_collection,
        }
        self._add(folder, pkg, common)

    def _add(self, folder: Path, parent: griffe.Module, common: dict[str, Any]) -> None:
        init = folder / "__init__.py"
        code = init.read_text("utf-8") if init.exists() else ""
        package = griffe.visit(folder.name, filepath=init, code=code, parent=parent, **common)
        parent.set_member(folder.name, package)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name != "__pycache__":
                self._add(path, package, common)
            elif path.suffix == ".py" and path != init:
                source = path.read_text("utf-8")
                module = griffe.visit(path.stem, filepath=path, code=source, parent=package, **common)
                package.set_member(path.stem, module)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        value = getattr(node, "value", None)
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field"):
            return
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if (description := given.get("description")) is not None and attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(description), parent=attr)
        default = value.args[0] if value.args else given.get("default")
        attr.value = None if default is None else ast.unparse(default)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Leave out what ``__init__`` merely keeps: attributes without a type and a word of explanation."""
        for name, member in list(cls.members.items()):
            kept = member.is_attribute and "instance-attribute" in member.labels
            if kept and member.annotation is None and member.docstring is None:
                cls.del_member(name)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = errors_apart(obj.docstring.value)


def errors_apart(text: str) -> str:
    """A docstring with ``A, B (why).`` under ``Raises:``, its last section, as one entry for each error."""
    head, mark, section = text.partition("Raises:\n")
    entries: list[str] = []
    said = True
    for line in section.splitlines():
        # Further in, an entry goes on; so does a line of names behind another.
        goes_on = line.startswith("     ") or not (ENTRY.match(line) or said)
        if goes_on and entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
            said = bool(ENTRY.match(line))
    lines: list[str] = []
    for entry in entries:
        named = [] if ENTRY.match(entry) else ERROR.findall(entry)
        lines += [f"    {name}: {why or meaning(name)}" for name, why in named] or [entry]
    return head + mark + "\n".join(lines)


def meaning(name: str) -> str:
    """What an error of ours says of itself, in one line."""
    error = getattr(errors, name, None) or getattr(catalog, name, None)
    return " ".join((error.__doc__ or "").split()) if error is not None else ""
