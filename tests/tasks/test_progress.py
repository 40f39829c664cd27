"""The bar of `show_progress`: on a terminal only, after a second, and gone at the end."""

import io
import time

from inlay.tasks.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_comes_after_a_second_on_a_terminal_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def work(seconds):
        for item in range(3):
            now[0] += seconds
            yield item

    for stream, seconds, shown in ((Terminal(), 2.0, True), (Terminal(), 0.1, False), (io.StringIO(), 2.0, False)):
        monkeypatch.setattr("sys.stderr", stream)
        assert list(show_progress(work(seconds), 3, "score", "batch")) == [0, 1, 2]
        text = stream.getvalue()
        assert ("score" in text) == shown and ("/3 " in text) == shown
        assert not text.rpartition("\r")[0].rpartition("\r")[2].strip()  # the line is empty again
