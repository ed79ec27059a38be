"""JupyterLab in a folder of its own, and a notebook opened in it with Chromium."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, TimeoutError, sync_playwright

TOKEN = "flux-lab-tests"
START_SECONDS = 180  # long enough for a busy machine: the waits end as soon as there is something to see
RUN_SECONDS = 600
CHANGE_SECONDS = 180
VIEWPORT = {"width": 1300, "height": 900}
PIECE, TOOLBARS = 2400, 150  # pixels of a notebook on one screenshot, and of what stands above it
ERROR = "application/vnd.jupyter.error"
WIDGET = "application/vnd.jupyter.widget-view+json"
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
READY = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return !!context && context.isReady && context.session?.kernel?.status === "idle";
}"""
OUTPUTS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap((cell, index) =>
    cell.type === "code" ? cell.toJSON().outputs.map(output => ({cell: index, ...output})) : [])"""

# Of the box that a control stands in: what its picture shows, what its line of text says, and whether one of them has come to rest.
PICTURE = "control => control.closest('.widget-vbox').querySelector('img').src"
STATUS = "control => control.closest('.widget-vbox').querySelector('.widget-html').innerText.trim()"
MOVED = f"(({STATUS})(box).includes('Error') || ({PICTURE})(box) !== before)"


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---- the server ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def own_folders(home: Path) -> dict[str, str]:
    """An environment in which JupyterLab reads and writes nothing of the person who runs the tests."""
    names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    names |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    for name, settings in SETTINGS.items():
        file = home / "settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    return {**os.environ, **{variable: str(home / folder) for variable, folder in names.items()}}


def wait_until_up(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(START_SECONDS * 4):
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/api?token={TOKEN}", timeout=2):
            return
        time.sleep(0.25)
    raise RuntimeError(f"JupyterLab did not start; the end of its log:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def serve(folder: Path, home: Path) -> Iterator[str]:
    """Serve `folder`, keeping all of JupyterLab's own files in `home`; yields the address."""
    port = free_port()
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    environment = own_folders(home)
    log = home / "lab.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---- a notebook in the browser ------------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """A notebook open in JupyterLab, with a kernel of its own."""

    page: Page
    name: str

    def run_all(self) -> list[dict]:
        """Run every cell; return all outputs, each with the number of its `cell`."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(READY, timeout=RUN_SECONDS * 1000)
        return self.page.evaluate(OUTPUTS)

    def controls(self) -> list[Locator]:
        """The controls of every widget: what stands in its box beside the picture and the line that tells its state."""
        boxes = self.page.locator(".jp-Notebook .jp-OutputArea .widget-vbox")
        expected = sum(WIDGET in output.get("data", {}) for output in self.page.evaluate(OUTPUTS))
        for number in range(expected):  # they are drawn some time after their cell has run
            boxes.nth(number).locator(".widget-image").wait_for()
        return boxes.locator("> .jupyter-widgets:not(.widget-html):not(.widget-image)").all()

    def move(self, control: Locator) -> str | None:
        """Move a control by one step, as a person would; what was wrong, or None if the picture in its widget then changed."""
        box, name = control.element_handle(), control.inner_text().split("\n")[0]
        before = box.evaluate(PICTURE)
        control.scroll_into_view_if_needed()
        moves = {".noUi-handle": push, "select": choose, "input[type=checkbox]": Locator.click, "input[type=text]": write_more}
        (part,) = [part for part in moves if control.locator(part).count()]
        moves[part](control.locator(part))
        try:
            self.page.wait_for_function(f"([box, before]) => {MOVED}", arg=[box, before], timeout=CHANGE_SECONDS * 1000)
        except TimeoutError:
            return f"{name}: the picture did not change"
        self.page.wait_for_function(READY, timeout=RUN_SECONDS * 1000)
        said = box.evaluate(STATUS)
        return f"{name}: {said}" if said else None

    def folded(self) -> list[Locator]:
        """The hints and solutions."""
        return self.page.locator(".jp-RenderedMarkdown details").all()

    def screenshot(self, path: Path) -> None:
        """The whole notebook from its beginning, in numbered pictures beside each other."""
        panel = "document.querySelector('.jp-NotebookPanel-notebook .jp-WindowedPanel-outer')"
        height = self.page.evaluate(f"() => {panel}.scrollHeight")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.set_viewport_size({"width": 1300, "height": PIECE + TOOLBARS})
        for number, top in enumerate(range(0, height, PIECE)):
            self.page.evaluate(f"top => {{ {panel}.scrollTop = top }}", top)
            self.page.wait_for_timeout(200)
            self.page.screenshot(path=path.with_stem(f"{path.stem}-{number:02}"))


def push(handle: Locator) -> None:
    """One step to the right on a slider, or to the left from its right end."""
    handle.press("ArrowLeft" if handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax") else "ArrowRight")


def choose(select: Locator) -> None:
    """The next item of a list; from the last one the first."""
    count = select.locator("option").count()
    select.select_option(index=(select.evaluate("select => select.selectedIndex") + 1) % count)


def write_more(line: Locator) -> None:
    line.fill(line.input_value() + " blue")
    line.press("Enter")


def errors(outputs: list[dict]) -> list[str]:
    """What went wrong in which cell, from the outputs of `Lesson.run_all`."""
    found = [output for output in outputs if output["output_type"] == "error" or ERROR in output.get("data", {})]
    return [f"cell {output['cell']}: {output.get('ename', ERROR)}: {output.get('evalue', '')}" for output in found]


@contextlib.contextmanager
def browse() -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments, timeout=START_SECONDS * 1000)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_lab(browser: Browser, url: str) -> Iterator[Page]:
    """JupyterLab with no notebook open, ready for commands."""
    with contextlib.closing(browser.new_page(viewport=VIEWPORT)) as page:
        page.set_default_timeout(START_SECONDS * 1000)
        page.goto(f"{url}/lab?reset&token={TOKEN}")
        page.wait_for_function("() => window.jupyterapp?.commands.hasCommand('docmanager:open')")
        page.evaluate("() => window.jupyterapp.restored.then(() => null)")
        yield page


@contextlib.contextmanager
def open_lesson(page: Page, name: str) -> Iterator[Lesson]:
    """Open a notebook and wait for its kernel; at the end shut the kernel down and close the notebook, as it was before."""
    page.set_viewport_size(VIEWPORT)
    page.evaluate("path => window.jupyterapp.commands.execute('docmanager:open', {path}).then(() => null)", name)
    page.wait_for_function(READY)
    try:
        yield Lesson(page, name)
    finally:
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        page.evaluate("() => window.jupyterapp.shell.currentWidget.dispose()")
