"""Extension of griffe: docstrings are written for ``help()`` with Sphinx's roles; the site wants Markdown."""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`(?P<short>~?)(?P<target>[^`]+)`")
_LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)


def to_markdown(text: str, owner: str) -> str:
    def role(found: re.Match) -> str:
        target = found["target"]
        name = target.rsplit(".", 1)[-1] if found["short"] else target
        identifier = target if "." in target else f"{owner}.{target}"
        return f'<autoref identifier="{identifier}" optional><code>{name}</code></autoref>'

    return _LITERAL_BLOCK.sub(":", _ROLE.sub(role, text))


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            owner = obj.path if obj.is_class or obj.is_module else obj.parent.path
            obj.docstring.value = to_markdown(obj.docstring.value, owner)
