"""Write the parts of docs/ that come from the code: ``scripts/vocabulary``. A test fails while they are stale."""

from pathlib import Path

from tritprune.neural_compressor.keys import table

DOCS = Path(__file__).parent
BEGIN, END = "<!-- keys: written by docs/generate.py -->\n", "<!-- end of keys -->\n"


def with_keys(page: str) -> str:
    """docs/neural_compressor.md with the table of keys as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "docs/neural_compressor.md has lost the marks around its table"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    return {"neural_compressor.md": with_keys((DOCS / "neural_compressor.md").read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
