"""Extension of griffe: docstrings are written for ``help()``, the site wants Markdown.

Sphinx's roles become links, and arguments that are described together (``word, type, position: ...``) stand
one by one.
"""

import re
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[2]
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`(?P<short>~?)(?P<target>[^`]+)`")
_GROUP = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*(?:\n {5,}.*)*)", re.MULTILINE)
_ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n(?:    .*\n?)+", re.MULTILINE)
_LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)


def defined(path: str) -> str:
    """The path of a public name, in its own module where that has the same path, as dynplan.ops.pack does."""
    is_module = (ROOT / path.replace(".", "/")).with_suffix(".py").is_file()
    return f"{path}.{path.rsplit('.', 1)[-1]}" if is_module else path


def one_by_one(text: str) -> str:
    """The docstring with an entry for each argument."""

    def entries(group: re.Match) -> str:
        return "\n".join(f"    {name}: {group['text']}" for name in group["names"].split(", "))

    return _ARGUMENTS.sub(lambda block: _GROUP.sub(entries, block[0]), text)


def to_markdown(text: str, owner: str) -> str:
    def role(found: re.Match) -> str:
        target = found["target"]
        name = target.rsplit(".", 1)[-1] if found["short"] else target
        identifier = target if "." in target else f"{owner}.{target}"
        return f'<autoref identifier="{defined(identifier)}" optional><code>{name}</code></autoref>'

    return _LITERAL_BLOCK.sub(":", _ROLE.sub(role, one_by_one(text)))


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            owner = obj.path if obj.is_class or obj.is_module else obj.parent.path
            obj.docstring.value = to_markdown(obj.docstring.value, owner)
