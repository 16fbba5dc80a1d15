"""A real headless Chromium for tests of pages: its own empty profile, no network, everything it complains of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services import require

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A fresh browser with `profile` (a folder that does not exist yet) to itself."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver_binary = require("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_binary))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(60)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """The few things tests do with a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, still: bool = True) -> None:
        """Show a local page at a window size, under a system that is dark, or does not want reduced motion."""
        width, height = size
        self.tell("Emulation.setDeviceMetricsOverride",
                  width=width, height=height, deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.tell("Emulation.setEmulatedMedia", features=features)
        self.driver.get(page.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def tell(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns (promises are waited for)."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 30) -> Any:
        """Wait until a script returns something true, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: self.run(script))

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def shown(self, selector: str) -> list[Any]:
        return [element for element in self.all(selector) if element.is_displayed()]

    def see(self, figure: str) -> None:
        """Bring a figure into view and wait until it is drawn."""
        self.run("document.getElementById(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", figure)
        self.until(f"return document.querySelector('#{figure} .chart svg') !== null")

    def see_all(self) -> list[str]:
        """Draw every figure; their ids."""
        figures = [element.get_attribute("id") for element in self.all("figure")]
        for figure in figures:
            self.see(figure)
        return figures

    def marks(self, figure: str, kind: str = "symbol") -> int:
        """How many marks of a kind (symbol, line, rule, rect, area) a figure shows."""
        return int(self.run(
            "return [...document.querySelectorAll(`#${arguments[0]} .mark-${arguments[1]}.role-mark path, "
            "#${arguments[0]} .mark-${arguments[1]}.role-mark line`)].length", figure, kind))  # fmt: skip

    def complaints(self) -> list[str]:
        """What the console says since the last time, warnings too."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def is_wider_than_window(self) -> bool:
        return bool(self.run("return document.documentElement.scrollWidth > window.innerWidth"))

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))
