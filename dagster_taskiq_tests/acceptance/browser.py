"""A real browser: headless Chromium, driven through Debian's ``chromedriver`` by Selenium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from dagster_taskiq_tests.acceptance.harness import until
from dagster_taskiq_tests.server_sources import missing

#: Names that Chromium goes by.
_NAMES = ("chromium", "chromium-browser", "google-chrome")

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--window-size=1600,1100",
)


class Browser:
    """One window, in which a user reads and clicks texts."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    @property
    def text(self) -> str:
        """All that is to be read on the page."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def await_text(self, *texts: str) -> str:
        """Wait until the page has all of these; the whole text of the page."""
        return until(self._reading(*texts), f"the page says {' and '.join(texts)}")

    def _reading(self, *texts: str) -> Callable[[], str]:
        def read() -> str:
            try:
                found = self.text
            except StaleElementReferenceException:  # the page has changed meanwhile
                return ""
            return found if all(text in found for text in texts) else ""

        return read

    def click(self, text: str, *, inside: str = "//body") -> None:
        """Click the button that has exactly this text, as soon as that can be done.

        Args:
            text: what is on it.
            inside: XPath of what it is in.
        """
        path = f"{inside}//button[normalize-space()='{text}' and not(@disabled)]"

        def clicked() -> bool:
            try:
                self.driver.find_element(By.XPATH, path).click()
            except (
                NoSuchElementException,
                StaleElementReferenceException,
                ElementClickInterceptedException,
            ):
                return False
            return True

        until(clicked, f"the button {text!r} is there to be clicked")

    def photograph(self, path: Path) -> None:
        """Keep a picture of the window."""
        self.driver.save_screenshot(str(path))


@contextmanager
def open_browser(directory: Path) -> Iterator[Browser]:
    """A browser that keeps nothing; skips or fails the test where there is none.

    Args:
        directory: of its profile, and of a picture of the page on which something failed.
    """
    chromium = next(filter(None, map(shutil.which, _NAMES)), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing("No Chromium: install chromium and chromedriver (Debian: chromium-driver).")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={directory / 'profile'}"):
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(chromedriver))
    browser = Browser(driver)
    try:
        yield browser
    except BaseException:
        browser.photograph(directory / "failed.png")
        print(f"The page, see {directory / 'failed.png'}:\n{browser.text}")  # noqa: T201
        raise
    finally:
        driver.quit()
