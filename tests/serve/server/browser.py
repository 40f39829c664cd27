"""A page in headless Chromium, driven by the DevTools protocol over two pipes."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 60


class Page:
    """One page; `say` sends a command, and `run` evaluates JavaScript."""

    def __init__(self, process, commands, answers):
        self._process, self._commands, self._answers = process, commands, answers
        self._ids, self._session, self._rest = itertools.count(1), None, b""
        self.messages = []  # what the browser said by itself
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.say(f"{domain}.enable")

    def say(self, method, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]
            self.messages.append(found)

    def _read(self):
        while b"\0" not in self._rest:
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def run(self, script):
        found = self.say("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url):
        self.messages.clear()
        self.say("Page.navigate", url=url)

    def wait_for(self, script):
        """Until a condition in the page is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def _find_middle(self, selector):
        node = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{node}.scrollIntoView({{block: 'center'}})")
        return self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({node}.getBoundingClientRect())")

    def drop(self, selector, file):
        """A file from the desktop onto an element."""
        x, y = self._find_middle(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.say("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def click(self, selector):
        x, y = self._find_middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.say("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            self.say("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "",
                     windowsVirtualKeyCode={"Tab": 9, "Enter": 13}.get(key, 0))  # fmt: skip

    def errors(self):
        """Of scripts, of the content policy, and requests to other places."""
        return [m for m in self.messages if m.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def asked(self):
        """Addresses that the page has loaded."""
        return [m["params"]["request"]["url"] for m in self.messages if m.get("method") == "Network.requestWillBeSent"]

    def photograph(self, path, *, width=1100, height=760, dark=False):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.say("Emulation.setEmulatedMedia", features=[scheme])
        self.say("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.say("Page.captureScreenshot")["data"]))


@contextmanager
def open_browser(profile):
    """A page in a browser of its own."""
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    options += ["--window-size=1100,760", "--disable-background-networking", "--no-first-run"]
    script = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'  # where Chromium looks for its pipes
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, *options],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(process, commands, answers)
    finally:
        os.close(commands)  # which ends it
        process.wait(PATIENCE_S)
        os.close(answers)
