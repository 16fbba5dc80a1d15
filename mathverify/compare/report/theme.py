"""How charts look: colours that colour-blind readers can tell apart, and Vega's config for light, dark and paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"
PAPER = "'Liberation Sans', Arial, Helvetica, sans-serif"

# Okabe & Ito 2008 (jfly.uni-koeln.de/color), in an order that puts the two most distinct first.
ON_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#555555")
ON_DARK = ("#56B4E9", "#F0944D", "#34C6A0", "#E39BC3", "#F0E442", "#9AA7FF", "#D3A27F", "#BBBBBB")
# Parts of viridis that keep their contrast on either ground.
RAMP_ON_LIGHT = ("#440154", "#443a83", "#31688e", "#21908c", "#35b779", "#7fbf2f")
RAMP_ON_DARK = ("#7a62c9", "#4f86c6", "#2db0a5", "#5cc863", "#aadc32", "#fde725")


def palette(ground: str) -> dict[str, str]:
    """Colours by the names that specs use for them."""
    dark = ground == "dark"
    ink, faint = ("#e8eaed", "#a9b0bb") if dark else ("#1c2430", "#5b6675")
    category = ON_DARK if dark else ON_LIGHT
    behind = "#1a2029" if dark else "#ffffff"
    return {"@ink": ink, "@faint": faint, "@accent": category[0], "@second": category[1], "@ground": behind}


def painted(spec: Any, colours: Mapping[str, str]) -> Any:
    """The spec with the names replaced by colours."""
    match spec:
        case dict():
            return {key: painted(value, colours) for key, value in spec.items()}
        case list():
            return [painted(value, colours) for value in spec]
        case str():
            return colours.get(spec, spec)
        case _:
            return spec


def config(ground: str) -> dict[str, Any]:
    """Vega-Lite config for a ground: `light`, `dark`, or `paper` (printed figures: larger type, no colour behind)."""
    dark, paper = ground == "dark", ground == "paper"
    ink, faint = palette(ground)["@ink"], palette(ground)["@faint"]
    lines = "#343b46" if dark else "#e3e6ea"
    category = list(ON_DARK if dark else ON_LIGHT)
    ramp = list(RAMP_ON_DARK if dark else RAMP_ON_LIGHT)
    size = 11 if paper else 12
    return {
        "background": "white" if paper else None,
        "font": PAPER if paper else SANS,
        "padding": 5,
        "view": {"stroke": None, "continuousHeight": 260, "continuousWidth": 320},
        "axis": {
            "labelColor": ink if paper else faint,
            "labelFontSize": size,
            "titleColor": ink,
            "titleFontSize": size,
            "titleFontWeight": "normal" if paper else 500,
            "titlePadding": 8,
            "gridColor": lines,
            "domainColor": faint,
            "tickColor": faint,
            "tickSize": 4,
            "labelPadding": 4,
            "labelOverlap": True,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False},
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "labelFontSize": size,
            "titleFontSize": size,
            "titleFontWeight": "normal" if paper else 500,
            "symbolSize": 90,
            "symbolStrokeWidth": 2,
            "labelLimit": 220,
            "orient": "bottom",
            "direction": "horizontal",
            "gradientLength": 160,
            "columnPadding": 14,
        },
        "text": {"color": ink, "fontSize": size},
        "point": {"filled": True, "size": 55},
        "rule": {"color": faint},
        "line": {"strokeWidth": 2},
        "bar": {"color": category[0]},
        "range": {"category": category, "ordinal": ramp, "ramp": ramp, "heatmap": ramp},
        "style": {"reference": {"strokeDash": [4, 4], "strokeWidth": 1.2}},
    }
