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

from playwright.sync_api import Locator, Page, Playwright, TimeoutError

TOKEN = "flux-lab-tests"
START_SECONDS = 60
RUN_SECONDS = 600
CHANGE_SECONDS = 60
PIECE, TOOLBARS = 2400, 150  # pixels of a notebook on one screenshot, and of what stands above it
ERROR = "application/vnd.jupyter.error"
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

    def sliders(self) -> list[Locator]:
        return self.page.locator(".jp-Notebook .noUi-handle").all()

    def move(self, slider: Locator) -> bool:
        """Move a slider one step with the keyboard; whether the picture in its output then changed."""
        handle = slider.element_handle()
        pictures = "handle => [...handle.closest('.jp-OutputArea').querySelectorAll('img')].map(image => image.src).join()"
        before, value = handle.evaluate(pictures), handle.get_attribute("aria-valuenow")
        key = "ArrowLeft" if value == handle.get_attribute("aria-valuemax") else "ArrowRight"
        slider.scroll_into_view_if_needed()
        slider.focus()
        slider.press(key)
        try:
            self.page.wait_for_function(
                f"([handle, before]) => ({pictures})(handle) !== before", arg=[handle, before], timeout=CHANGE_SECONDS * 1000
            )
        except TimeoutError:
            return False
        self.page.wait_for_function(READY, timeout=RUN_SECONDS * 1000)
        return True

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


def errors(outputs: list[dict]) -> list[str]:
    """What went wrong in which cell, from the outputs of `Lesson.run_all`."""
    found = [output for output in outputs if output["output_type"] == "error" or ERROR in output.get("data", {})]
    return [f"cell {output['cell']}: {output.get('ename', ERROR)}: {output.get('evalue', '')}" for output in found]


@contextlib.contextmanager
def browse(playwright: Playwright) -> Iterator[Page]:
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
    try:
        yield browser.new_page(viewport={"width": 1300, "height": 900})
    finally:
        browser.close()


@contextlib.contextmanager
def open_lesson(page: Page, url: str, name: str) -> Iterator[Lesson]:
    """Open a notebook and wait for its kernel; shut the kernel down at the end."""
    page.goto(f"{url}/lab/tree/{name}?reset&token={TOKEN}")
    page.wait_for_function(READY, timeout=START_SECONDS * 1000)
    try:
        yield Lesson(page, name)
    finally:
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
