"""Tables of figures in the docs, from the committed JSON alone: ``python scripts/docs/tables.py``.

A table stands between ``<!-- table: KIND ... -->`` and ``<!-- end of table -->``:

    engines              every current run in bench/history/compare_cpu.jsonl, a heading for each
    headline             one of these runs in short
    report FILE          the rows of a report's results.json

A figure has one home, its JSON; what is written by hand between the two lines is lost.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HISTORY = "bench/history/compare_cpu.jsonl"
_BLOCK = re.compile(
    r"(?P<head><!-- table: (?P<spec>[^\n]*?) -->\n).*?(?P<tail><!-- end of table -->)", re.DOTALL
)
_MODELS = {"small": "12 layers of width 384", "bert-base": "BERT-base's size", "minilm": "MiniLM-L6"}
_HEADLINE = ("small", "sentences", 32, "native")
_NAMES = {
    "hf-eager": "Hugging Face eager",
    "hf-sdpa": "Hugging Face sdpa",
    "torch.compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-int8": "ONNX Runtime int8",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
    "dynplan": "dynplan",
    "dynplan-int8": "dynplan int8",
    "dynplan-bf16": "dynplan bfloat16",
}


def runs(rows: list[dict]) -> list[list[dict]]:
    """Runs, newest first; one that a later run of the same case repeated, with no fewer sentences and
    engines, is left out."""
    by_run: dict[tuple, list[dict]] = {}
    for row in rows:
        by_run.setdefault((row["time"], *_case(row), row["sentences"]), []).append(row)
    kept: list[list[dict]] = []
    for run in sorted(by_run.values(), key=lambda run: run[0]["time"], reverse=True):
        if not any(_repeats(later, run) for later in kept):
            kept.append(run)
    return kept


def _case(row: dict) -> tuple:
    return row["model"], row["lengths"], row["batch"], row["isa_limit"]


def _repeats(later: list[dict], run: list[dict]) -> bool:
    engines = {row["engine"] for row in run} - {row["engine"] for row in later}
    return _case(later[0]) == _case(run[0]) and later[0]["sentences"] >= run[0]["sentences"] and not engines


def engines(rows: list[dict]) -> str:
    models = list(_MODELS)
    ordered = sorted(
        runs(rows),
        key=lambda run: (
            models.index(run[0]["model"]),
            run[0]["isa_limit"] != "native",
            str(run[0]["lengths"]) != "sentences",
            str(run[0]["lengths"]),
            run[0]["batch"],
            -run[0]["sentences"],
        ),
    )
    return "\n\n".join(
        part for run in ordered for part in (_heading(run[0]), _facts(run[0]), _engine_table(run))
    )


def _heading(row: dict) -> str:
    what = "sentences" if row["lengths"] == "sentences" else f"samples of {row['lengths']} tokens"
    isa = "" if row["isa_limit"] == "native" else f", {row['isa_limit'].upper()} alone"
    return f"### {_MODELS[row['model']]}, batch {row['batch']}, {row['sentences']} {what}{isa}"


def _facts(row: dict) -> str:
    return (
        f"{row['device']} ({row['isa']}), {row['threads']} threads, torch {row['torch']}, "
        f"commit {row['commit']}, {row['time'][:10]}, {row['rounds']} round{'s' * (row['rounds'] > 1)}; "
        f"{row['tokens']} tokens; product peak {row['product_peak'] / 1e9:.0f} GFLOP/s."
    )


def _engine_table(run: list[dict]) -> str:
    header = [
        "engine",
        "sentences/s",
        "time, of fastest rival",
        "of product peak",
        "relative error",
        "MiB",
        "others' CPU",
    ]
    cells = [
        [
            _engine(row),
            f"{row['sentences'] / row['p50']:.1f}",
            f"{row['of_fastest_rival']:.2f}",
            f"{row['peak_share']:.0%}",
            f"{row['error']:.0e}",
            f"{row['memory'] / 2**20:.0f}",
            f"{row['foreign']:.0%}",
        ]
        for row in run
    ]
    return _markdown(header, cells)


def _engine(row: dict) -> str:
    name = _NAMES[row["engine"]]
    if row["engine"].startswith("dynplan"):
        kept = "all layers" if row["share"] == 1 else f"{row['kept']:.3g} of the layers"
        return f"**{name}, {kept}**"
    return f"{name}, {row['order']}"


def headline(rows: list[dict]) -> str:
    run = max((run for run in runs(rows) if _case(run[0]) == _HEADLINE), key=lambda run: run[0]["sentences"])
    theirs = next(row for row in run if row["engine"] == "hf-sdpa" and row["order"] == "as given")
    shown = [row for row in run if row["share"] in (1.0, 0.5)]
    cells = [
        [_engine(row), f"{row['sentences'] / row['p50']:.0f}", f"{theirs['p50'] / row['p50']:.1f} x"]
        for row in shown
    ]
    return (
        _markdown(["engine", "sentences/s", "speed"], cells) + f"\n\n{_heading(run[0])[4:]}. {_facts(run[0])}"
    )


def report(name: str) -> str:
    """The table that the report beside ``name`` holds."""
    from dynplan.training.data import Task
    from dynplan.training.evaluate import Row
    from dynplan.training.report import markdown_table

    results = json.loads((ROOT / name).read_text(encoding="utf-8"))
    return markdown_table(Task(**results["task"]), [Row(**row) for row in results["rows"]])


def _markdown(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str) -> str:
    """``text`` with every table made anew."""
    history = [json.loads(line) for line in (ROOT / HISTORY).read_text(encoding="utf-8").splitlines()]

    def table(block: re.Match) -> str:
        kind, *arguments = block["spec"].split()
        made = {"engines": lambda: engines(history), "headline": lambda: headline(history), "report": report}[
            kind
        ]
        return f"{block['head']}\n{made(*arguments)}\n\n{block['tail']}"

    return _BLOCK.sub(table, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(page.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
