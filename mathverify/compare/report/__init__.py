"""The report: report.html for a person who would rather look than read tables, and the same figures for a paper.

facts.py      runs -> numbers of figures, sampled where they are too many for a page
rows.py       the test rows themselves: verdicts packed, texts of the rows that runs disagree on
importance.py which setting explains the spread (Optuna's fANOVA)
judged.py     what verdict.py and table.py concluded, as rows and tables of the page
charts.py     one Vega-Lite spec for each figure; theme.py: its colours and type
sections.py   the sections, each figure with its sentence
content.py    all of these, made once
page.py       -> report.html, with page.html, page.css and page.js
figures.py    -> SVG and PNG; pair.py: the tables that page.js makes, for paper

Altair makes the specs; Vega's JavaScript (inlined in the page) and the renderer of --figures come from vl-convert.
These and Jinja are the extra mathverify[report]; nothing else of compare imports this package.
"""

from __future__ import annotations

import importlib.util

from mathverify.errors import UserError

NEEDED = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "Jinja2"}


def require_extra(option: str) -> None:
    """Raises UserError when a package of the extra is missing."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{option} needs {' and '.join(missing)}: pip install 'mathverify[report]'")
