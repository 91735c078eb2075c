"""The web page of real workers and servers: read by a program, and watched in a real browser."""

from __future__ import annotations

import http.client
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import pytest
from selenium.webdriver.common.by import By

from dagster_taskiq_tests.acceptance.browser import open_browser
from dagster_taskiq_tests.acceptance.harness import (
    BrokerKind,
    Stack,
    open_stack,
    until,
)
from dagster_taskiq_tests.unit.dashboard_client import fields_of, text_of

#: Redis is that of the test in the browser.
KINDS: tuple[BrokerKind, ...] = ("rabbitmq", "embedded", "postgres")

LEASE_SECONDS = 5.0


@dataclass
class Dashboard:
    """A page that is served."""

    settings: str
    url: str
    client: httpx.Client

    @property
    def text(self) -> str:
        """What is to be read on it; it never fails."""
        answer = self.client.get(self.url)
        assert answer.status_code == 200, answer.text
        return text_of(answer.text)

    def await_text(self, *texts: str) -> str:
        """Wait until it has all of them."""

        def look() -> str:
            text = self.text
            return text if all(it in text for it in texts) else ""

        return until(look, f"the page says {texts}")

    def order(self, label: str) -> None:
        """Click the only button of that name, and say that it is meant."""
        (href,) = re.findall(rf'href="(/order[^"]*)"[^>]*>{label}<', self.client.get(self.url).text)
        form = self.client.get(self.url.rstrip("/") + href.replace("&amp;", "&"))
        origin = {"Origin": self.url.rstrip("/")}
        done = self.client.post(f"{self.url}order", data=fields_of(form.text), headers=origin)
        assert done.status_code == 303


@contextmanager
def open_dashboard(stack: Stack) -> Iterator[Dashboard]:
    """The page of a stack, which must end without an error, and at once."""
    settings = str(stack.settings_file())
    process, log = stack.background("dashboard", "--port", "0", "--allow-actions", "-y", settings)
    (url,) = until(
        lambda: re.findall(r"The page is at (\S+)", log.read_text()), "the page is served"
    )
    with httpx.Client(timeout=30) as client:
        yield Dashboard(settings, url, client)
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        stream = http.client.HTTPConnection(host, int(port), timeout=30)
        stream.request("GET", "/events")
        assert stream.getresponse().readline().startswith(b"data: ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, log.read_text()
    stream.close()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_shows_and_empties_a_worker(kind: str, tmp_path: Path) -> None:
    """On each kind of server: what runs, what has ended, and an order that a worker obeys."""
    with open_stack(cast("BrokerKind", kind), tmp_path) as stack, open_dashboard(stack) as page:
        worker = stack.worker(slots=1, name="only").await_ready()
        run = stack.start("one_gated")
        run.await_notes("started")
        stack.cli("worker", "ping", "only", "-y", page.settings)  # its heartbeat tells what it runs
        text = page.await_text(f"gated {run.run_id[:8]}", "All is well")
        assert worker.full_name in text
        assert ("not told" in text) == (kind == "rabbitmq")
        page.order("Drain")
        page.await_text(f"{worker.full_name} finishes its steps and stops.", "draining")
        run.open_gate()
        assert run.wait().is_success
        assert worker.wait() == 0
        if kind == "embedded":
            page.await_text("No process uses the embedded server")  # which went with the worker
        else:
            page.await_text("gated succeeded", "No worker is running")


def test_a_death_is_seen_without_a_reload(tmp_path: Path) -> None:
    """Of two workers one is killed: its step is lost, and goes to the other one."""
    with (
        open_stack("redis", tmp_path) as stack,
        open_dashboard(stack) as page,
        open_browser(tmp_path) as browser,
    ):
        first = stack.worker(slots=1, name="first").await_ready()
        browser.open(page.url)
        browser.await_text("live", first.full_name)
        browser.driver.execute_script("window.unloaded = 'never'")
        run = stack.start("hangs_once", lease_seconds=LEASE_SECONDS)
        run.await_notes("started")
        second = stack.worker(slots=1, name="second").await_ready()
        stack.cli("worker", "ping", "first", "-y", page.settings)
        browser.await_text(second.full_name, "with_grandchild")
        button = browser.driver.find_element(By.PARTIAL_LINK_TEXT, "Dra")
        browser.driver.execute_script("arguments[0].focus()", button)
        first.kill()
        text = browser.await_text("lost, retried", run.run_id[:8])
        assert "its lease on this attempt ended" in text
        browser.await_text("try 2")
        assert run.wait().is_success
        browser.await_text("Nothing waits and nothing is executed.")
        assert browser.driver.execute_script("return window.unloaded") == "never"
        assert browser.driver.switch_to.active_element == button
        assert browser.driver.get_log("browser") == []
        browser.driver.find_element(
            By.XPATH, f"//a[@aria-label='Drain {second.full_name}']"
        ).click()
        browser.click("Drain")
        browser.await_text(f"{second.full_name} finishes its steps and stops.")
        assert second.wait() == 0
