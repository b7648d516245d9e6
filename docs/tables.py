"""Prints the tables of docs/results/ from the JSON rows beside each page.

    python docs/tables.py

A page NAME.md holds `<!-- table: T -->` … `<!-- end -->`; what stands between is written from
table T of NAME.json: its `columns` (row key → heading) and its `rows`, as a bench printed them.
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / 'results'
BLOCK = re.compile(r'(<!-- table: (\S+) -->\n).*?(<!-- end -->)', re.DOTALL)


def rendered(page: Path) -> str:
    """The page's text with every table printed from its rows.

    Raises:
      KeyError: a table that the page's JSON lacks, or a row without one of the columns.
    """
    tables = json.loads(page.with_suffix('.json').read_text())['tables']
    return BLOCK.sub(lambda m: f'{m[1]}\n{markdown(**tables[m[2]])}\n\n{m[3]}', page.read_text())


def markdown(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    lines = [list(columns.values()), ['---'] * len(columns)]
    lines += [[cell(row[key]) for key in columns] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cell(value: Any) -> str:
    """A number as people read it, '' for what was not measured."""
    if value is None:
        return ''
    if isinstance(value, float) and abs(value) >= 1000:
        value = round(value)
    return f'{value:,}' if isinstance(value, int | float) else str(value)


def pages() -> list[Path]:
    return sorted(path.with_suffix('.md') for path in RESULTS.glob('*.json'))


if __name__ == '__main__':
    for page in pages():
        page.write_text(rendered(page))
