"""report.html in a real Chromium: nothing complains, figures are drawn, filters, search, hover, toggle and keys work.

With PICTURES=FOLDER in the environment screenshots are left there, for looking at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from mathverify.compare.reading import read_runs
from mathverify.compare.report.content import Content, collect
from mathverify.compare.report.page import write_report
from mathverify.compare.report.pair import differences
from mathverify.compare.verdict import judge
from mathverify.records import Status

from . import synthetic
from .browser import DESKTOP, PHONE, Browser, chromium
from .test_report import HOSTILE

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(autouse=True)
def calm(browser: Browser, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with a console that said nothing."""
    browser.complaints()
    yield
    if folder := os.environ.get("PICTURES"):
        browser.picture(Path(folder) / f"{request.node.name}.png")
    assert browser.complaints() == []


def report_of(folder: Path) -> tuple[Path, Content]:
    comparison = read_runs([folder])
    content = collect(comparison, judge(comparison, resamples=200))
    return write_report(content, folder.parent / f"{folder.name}.html"), content


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """Eight finished runs of four configurations, and one that failed."""
    folder = synthetic.sweep(tmp_path_factory.mktemp("eight") / "runs", 8, seeds=2)
    synthetic.run(folder / "bad", synthetic.SHAPES[3], 9, state=Status.failed)
    return report_of(folder)


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    states = [Status.completed] * 11 + [Status.failed] + [Status.completed] * 12 + [Status.pruned]
    return report_of(synthetic.sweep(tmp_path_factory.mktemp("hundred") / "runs", 100, states=states, test_rows=1000))


def test_every_figure_is_drawn_on_a_desktop_and_on_a_phone(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, content = eight
    for size, dark in ((DESKTOP, False), (DESKTOP, True), (PHONE, False)):
        browser.open(page, size, dark=dark)
        figures = browser.see_all()
        assert figures == [figure.id for section in content.sections for figure in section.figures]
        for figure in figures:
            width = browser.run(
                "return document.querySelector(`#${arguments[0]} svg`).getBoundingClientRect().width", figure
            )
            assert 200 < width <= size[0]
            assert browser.one(f"#{figure} svg").get_attribute("aria-label")
        assert not browser.is_wider_than_window()


def test_a_hundred_runs_fit_and_paint_fast(browser: Browser, hundred: tuple[Path, Content]) -> None:
    """The bounds are the promised ones (5 MB, 2 s); what was measured is printed."""
    page, _ = hundred
    size = page.stat().st_size
    start = time.perf_counter()
    browser.open(page)
    ready = time.perf_counter() - start
    paints = browser.run("return performance.getEntriesByType('paint').map((e) => [e.name, e.startTime])")
    first = dict(paints)["first-contentful-paint"]
    print(f"100 runs: {size / 1e6:.2f} MB, first contentful paint {first:.0f} ms, ready after {ready:.1f} s")
    assert size < 5_000_000
    assert first < 2000
    figures = browser.see_all()
    assert browser.marks("parallel_coordinates", "line") >= 80
    browser.open(page, PHONE)
    browser.see_all()
    assert not browser.is_wider_than_window() and figures


def test_the_filter_takes_runs_out_of_table_and_figures(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, content = eight
    browser.open(page)
    browser.see("cost_quality")
    rank = str(content.facts.runs[0]["p0"])
    fitting = [row for row in content.facts.runs if str(row["p0"]) == rank]
    before = browser.marks("cost_quality")
    browser.run("const s = document.querySelector('#filters select'); s.value = arguments[0];"
                "s.dispatchEvent(new Event('input', {bubbles: true}))", rank)  # fmt: skip
    browser.until(f"return document.querySelectorAll('#runs tbody tr:not([hidden])').length === {len(fitting)}")
    assert browser.one("#shown").text == f"{len(fitting)} of 9 runs"
    browser.until("return document.querySelectorAll('#cost_quality .mark-symbol.role-mark path').length < "
                  f"{before}")  # fmt: skip
    browser.one("#filters button[type=reset]").click()
    browser.until("return document.querySelectorAll('#runs tbody tr:not([hidden])').length === 9")
    browser.until(f"return document.querySelectorAll('#cost_quality .mark-symbol.role-mark path').length === {before}")
    browser.one("#find").send_keys("failed")
    browser.until("return document.querySelectorAll('#runs tbody tr:not([hidden])').length === 1")
    assert browser.one("#runs tbody tr:not([hidden])").get_attribute("data-run") == "8"


def test_a_heading_sorts_and_says_so(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, _ = eight
    browser.open(page)
    heads = [head.text for head in browser.all("#runs thead th")]
    place = heads.index("train s")
    button = browser.all("#runs thead th button")[place]
    shown = f"return [...document.querySelectorAll('#runs tbody tr')].map((r) => r.children[{place}].dataset.sort)"
    for direction, sign in (("descending", -1), ("ascending", 1)):
        button.send_keys("\ue007")  # Enter: by keyboard
        assert browser.all("#runs thead th")[place].get_attribute("aria-sort") == direction
        values = [float(value) for value in browser.run(shown)]
        assert values == sorted(values, key=lambda value: sign * value)
    by_accuracy = browser.all("#runs thead th button")[2]
    by_accuracy.click()
    by_accuracy.click()
    assert browser.run("return document.querySelector('#runs tbody').lastElementChild.dataset.run") == "8"  # has none


def test_pointing_at_a_mark_lights_its_run_and_tells_of_it(browser: Browser, eight: tuple[Path, Content]) -> None:
    from selenium.webdriver import ActionChains

    page, content = eight
    browser.open(page)
    browser.see("cost_quality")
    marks = browser.all("#cost_quality .mark-symbol.role-mark path")
    ActionChains(browser.driver).move_to_element(marks[0]).perform()
    lit = browser.until("return document.querySelector('#runs tr.hot')?.dataset.run")
    tip = browser.until("return document.querySelector('#vg-tooltip-element.visible')?.textContent")
    assert content.facts.runs[int(lit)]["label"] in tip
    faded = "return [...document.querySelectorAll('#cost_quality .mark-symbol.role-mark path')].filter((p) => Number(p.getAttribute('opacity') ?? 1) < 0.5).length"
    assert browser.until(faded) > 0
    ActionChains(browser.driver).move_to_element(browser.one("h1")).perform()
    browser.until("return document.querySelector('#runs tr.hot') === null")


def test_two_runs_are_compared_as_python_compares_them(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, content = eight
    browser.open(page)
    for a, b in ((0, 5), (7, 2)):
        browser.run("for (const [id, run] of [['pick-a', arguments[0]], ['pick-b', arguments[1]]])"
                    "{ const s = document.getElementById(id); s.value = run; s.dispatchEvent(new Event('change')); }", a, b)  # fmt: skip
        expected = differences(content.facts.predictions[a], content.facts.predictions[b])
        browser.see("slice_difference")
        details = browser.one("#slice_difference details")
        browser.run("arguments[0].open = true", details)
        browser.until("return document.querySelectorAll('#slice_difference details tbody tr').length > 0")
        found = browser.run(
            "return [...document.querySelectorAll('#slice_difference details table tbody tr')]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        browser.run("arguments[0].open = false; arguments[0].querySelector('div').replaceChildren()", details)
        assert [row[0] for row in found] == [row["slice"] for row in expected]
        for shown, row in zip(found, expected, strict=True):
            assert [float(cell) for cell in shown[1:7]] == pytest.approx(
                [row[k] for k in ("difference", "low", "high", "only_a", "only_b", "rows")], rel=2e-3, abs=1e-3
            )
        summary = browser.one("#pair-summary").text
        assert f"{expected[0]['only_a']} rows only A" in summary and f"{expected[0]['only_b']} only B" in summary
    browser.run("document.getElementById('swap').click()")
    assert browser.one("#pick-a").get_attribute("value") == "2"


def test_the_page_tests_as_compare_does(browser: Browser, eight: tuple[Path, Content]) -> None:
    """p of the first pair is that of the exact test over questions."""
    import numpy as np

    from mathverify.compare.paired import compare_runs

    page, content = eight
    browser.open(page)
    a, b = (content.facts.predictions[n] for n in content.pair)
    codes = np.unique(np.asarray(a.groups), return_inverse=True)[1]
    (exact,) = compare_runs((a.scores > 0) == a.labels, [(b.scores > 0) == b.labels], codes, resamples=100)
    said = browser.one("#pair-summary").text
    assert ("p < 0.0001" if exact.p < 0.0001 else f"p = {exact.p:.2g}") in said.replace("p = 1.0", "p = 1")


def test_the_rows_two_runs_disagree_on_can_be_searched(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, content = eight
    browser.open(page)
    a, b = (content.facts.predictions[n] for n in content.pair)
    whole = differences(a, b)[0]
    total = whole["only_a"] + whole["only_b"]
    assert browser.one("#row-count").text.startswith(f"{min(20, total)} of {total} that fit")
    first = browser.one("#row-list li .question").text
    assert any(row["question"] == first for row in synthetic.rows().to_pylist())
    browser.one("#row-search").send_keys(first)
    browser.until("return document.querySelectorAll('#row-list > li').length >= 1 && "
                  "document.querySelectorAll('#row-list > li').length < 5")  # fmt: skip
    assert browser.one("#row-list li .question").text == first
    browser.one("#row-search").send_keys(" nothing-has-this-word")
    browser.until("return document.querySelectorAll('#row-list > li').length === 0")
    browser.run("const s = document.getElementById('row-search'); s.value = ''; s.dispatchEvent(new Event('input'))")
    browser.run("const s = document.getElementById('row-which'); s.value = 'a'; s.dispatchEvent(new Event('input'))")
    browser.until(f"return document.getElementById('row-count').textContent.includes('of {whole['only_a']} that fit')")


def test_dark_and_light_follow_the_system_and_the_button(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, _ = eight
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    ink = "return document.querySelector('#cost_quality .role-axis-title text').getAttribute('fill')"
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page, dark=True)
    browser.see("cost_quality")
    dark, dark_ink = browser.run(ground), browser.run(ink)
    browser.run("document.getElementById('theme').click()")
    browser.until(f"{ink} !== '{dark_ink}'")
    light = browser.run(ground)
    assert dark != light and browser.one("#theme").get_attribute("aria-pressed") == "false"
    browser.open(page, dark=True)  # the choice is kept
    assert browser.run(ground) == light
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read_on_their_ground(browser: Browser, eight: tuple[Path, Content], dark: bool) -> None:
    """WCAG 2.1's contrast of 4.5 for all text of the page and of the axes."""
    page, _ = eight
    browser.open(page, dark=dark)
    browser.see_all()
    poor = browser.run("""
        const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const ground = (node) => {
          for (; node; node = node.parentElement) {
            const c = numbers(getComputedStyle(node).backgroundColor);
            if (c.length === 3 || c[3] > 0.99) return c;
          }
          return [255, 255, 255];
        };
        const texts = [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility() &&
          [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()) &&
          !['SCRIPT', 'STYLE', 'OPTION', 'NOSCRIPT'].includes(node.tagName) && !node.closest('.visually-hidden, .skip'));
        return texts.map((node) => {
          const style = getComputedStyle(node), svg = node.closest('svg');
          const colour = numbers(svg ? style.fill : style.color);
          const [a, b] = [luminance(colour), luminance(ground(svg ? svg.parentElement : node))].sort((x, y) => y - x);
          return [(a + 0.05) / (b + 0.05), node.textContent.slice(0, 40), svg ? style.fill : style.color];
        }).filter(([ratio]) => ratio < 4.5)""")
    assert poor == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, _ = eight
    browser.open(page)
    body = browser.one("body")
    seen: list[str] = []
    for _ in range(60):
        browser.driver.switch_to.active_element.send_keys("\ue004") if seen else body.send_keys("\ue004")  # Tab
        found = browser.run("""
            const node = document.activeElement, style = getComputedStyle(node);
            return [node.id || node.className || node.textContent.trim().slice(0, 20) || node.tagName,
                    style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2]""")
        name, is_visible = found
        assert is_visible, f"{name} has the focus and does not show it"
        seen.append(name)
    assert seen[0] == "skip"
    assert {"theme", "find", "Ranking"} <= set(seen)
    assert any("scroller" in name for name in seen)
    unnamed = browser.run("""
        return [...document.querySelectorAll('button, select, input, a')].filter((node) => {
          const label = node.getAttribute('aria-label') || node.closest('label')?.textContent || node.textContent;
          return !label.trim();
        }).length + document.querySelectorAll('table th:not([scope])').length""")
    assert unnamed == 0


def test_reduced_motion_is_heeded(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, _ = eight
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    browser.open(page, still=False)
    assert browser.run(behaviour) == "smooth"
    browser.open(page, still=True)
    assert browser.run(behaviour) == "auto"
    moving = "return [...document.querySelectorAll('*')].filter((n) => parseFloat(getComputedStyle(n).transitionDuration) > 0 || parseFloat(getComputedStyle(n).animationDuration) > 0).length"
    assert browser.run(moving) == 0


def test_hostile_text_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    rows = synthetic.rows(60)
    texts = pa.array([f"{HOSTILE[k % len(HOSTILE)]} {k}" for k in range(60)])
    for name in ("question", "answer", "solution", "slice"):
        column = pa.array(HOSTILE * 12) if name == "slice" else texts
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    folder = synthetic.sweep(
        tmp_path / "runs", 4, table=rows, rename=lambda n: f"<img src=x onerror=window.hacked={n}>"
    )
    comparison = read_runs([folder])
    content = collect(comparison, judge(comparison, resamples=200))
    assert not isinstance(content.rows, str)
    for row, text in zip(content.rows.listed, HOSTILE * 12, strict=False):  # the text itself, as if read from its data
        row |= {"question": text, "answer": text, "solution": text}
    page = write_report(content, tmp_path / "report.html")
    browser.open(page)
    browser.see_all()
    for details in browser.all("details[data-table] summary"):
        browser.run("arguments[0].click()", details)
    assert browser.run("return window.hacked") is None
    shown = {element.text for element in browser.all("#row-list .question")}
    assert any("<script>" in text for text in shown)
    assert browser.run("return document.querySelectorAll('#row-list img, #row-list script, #runs img').length") == 0
    assert any("onerror" in head.text for head in browser.all("#runs tbody th"))


def test_the_policy_forbids_the_network(browser: Browser, eight: tuple[Path, Content]) -> None:
    page, _ = eight
    browser.open(page)
    told = browser.driver.execute_async_script("""
        const done = arguments[0];
        document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective), {once: true});
        fetch('http://127.0.0.1:9/').catch(() => {});
        setTimeout(() => done('nothing'), 3000)""")
    assert told == "connect-src"
    assert (
        browser.run("return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length")
        == 0
    )
    assert any("Content Security Policy" in line for line in browser.complaints())  # ours, from the attempt


@pytest.mark.parametrize(
    ("runs", "states"), [(1, [Status.completed]), (3, [Status.failed]), (2, [Status.running]), (2, [Status.completed])]
)
def test_few_or_failed_runs_make_a_whole_page(
    browser: Browser, tmp_path: Path, runs: int, states: list[Status]
) -> None:
    page, content = report_of(synthetic.sweep(tmp_path / "runs", runs, states=states, seeds=1))
    for size in (DESKTOP, PHONE):
        browser.open(page, size)
        browser.see_all()
        assert not browser.is_wider_than_window()
    assert len(browser.all("#runs tbody tr")) == runs
    assert bool(browser.all("#left-out")) == any(section.absent for section in content.sections)


def test_a_figure_can_be_saved(browser: Browser, eight: tuple[Path, Content], tmp_path: Path) -> None:
    page, _ = eight
    browser.tell("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open(page)
    browser.see("calibration")
    browser.run("document.querySelector('[data-save=calibration]').click()")
    for _ in range(100):
        if (saved := tmp_path / "calibration.svg").exists():
            break
        time.sleep(0.1)
    assert saved.read_text("utf-8").startswith("<svg")
