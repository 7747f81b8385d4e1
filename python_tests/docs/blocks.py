"""The code blocks of README and docs."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?P<text>(?:    \S.*\n)(?:    .*\n)*)")


@dataclass(frozen=True)
class Block:
    """language: what stands behind the fence, "sh" where nothing does; line: of its first line, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))

        def block(match: re.Match, language: str, text: str = text, name: str = name) -> Block:
            return Block(name, text.count("\n", 0, match.start("text")) + 1, language, match["text"])

        found += [block(match, match["language"] or "sh") for match in _FENCED.finditer(text)]
        bare = _FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
        found += [block(match, "sh", bare) for match in _INDENTED.finditer(bare)]
    return found
