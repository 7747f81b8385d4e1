"""Hook of mkdocs: pages from files outside ``docs/``, the command line's page, links for both places.

The same Markdown is read in the repository and on the site. Links are written for the repository. On the site
a link to a file that has no page there becomes its plain text; one to a file that does not exist fails the
build.
"""

import os
import re
from pathlib import Path, PurePosixPath

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "csrc/README.md",
    "csrc/kernels/region_cross_entropy/README.md",
    "examples/segmentation/README.md",
    "examples/serving/README.md",
)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    source = page.file.src_uri
    folder = PurePosixPath(source if source in PAGES else f"docs/{source}").parent

    def rewrite(link: re.Match) -> str:
        path = os.path.normpath(folder / link["target"])
        uri = path if path in PAGES else path.removeprefix("docs/")
        if files.get_file_from_path(uri) is not None:
            target = os.path.relpath(uri, PurePosixPath(source).parent)
            return f"[{link['text']}]({target}{link['anchor'] or ''})"
        return link["text"] if (ROOT / path).exists() else link[0]

    return _LINK.sub(rewrite, markdown)


def command_line() -> str:
    """Every command with its options, from the parser itself."""
    from dynplan.cli import app

    group = typer.main.get_command(app)
    text = ["# Command line", group.help or ""]
    for name, command in group.commands.items():
        rows = []
        for option in command.params:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            default = option.show_default if isinstance(option.show_default, str) else option.default
            default = (
                "required" if option.required else "" if default in (None, False, ()) else f"`{default}`"
            )
            help_text = " ".join((getattr(option, "help", None) or "").split()).replace("|", "\\|")
            rows.append(f"| {names} | {default} | {help_text} |")
        text += [f"## dynplan {name}", command.help or ""]
        if rows:
            text.append("\n".join(["| option | default | meaning |", "| :-- | :-- | :-- |", *rows]))
    return "\n\n".join(text) + "\n"
