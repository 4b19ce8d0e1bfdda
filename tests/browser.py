"""A headless Chromium that tests can drive, over a pipe, without any library; a skip where there is none."""

import base64
import json
import os
import select
import shutil
import subprocess

import pytest

OPTIONS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync --remote-debugging-pipe"

PATIENCE = 120  # seconds without a word from the browser


class Browser:
    """A page in a browser: `open` it, `run` script in it, and look at what it `complains` of."""

    def __init__(self, folder):
        name = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if name is None:
            pytest.skip("no Chromium")
        (theirs_in, self.out), (self.into, theirs_out) = os.pipe(), os.pipe()
        command = f'exec "{name}" {OPTIONS} --user-data-dir="{folder}" about:blank 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.session, self.rest, self.complaints, self.loaded = 0, {}, b"", [], 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def read(self):
        """The next message of the browser."""
        while b"\0" not in self.rest:
            assert select.select([self.into], [], [], PATIENCE)[0], "the browser is silent"
            part = os.read(self.into, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(message)
        self.loaded += message.get("method") == "Page.loadEventFired"
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(message["params"])
        return message

    def send(self, method, **parameters):
        """The browser's answer to a command of its DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path):
        before = self.loaded
        self.send("Page.navigate", url=path.as_uri())
        while self.loaded == before:
            self.read()

    def run(self, script):
        """The value of a script's last expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def size(self, width, height, dark=False, phone=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)
