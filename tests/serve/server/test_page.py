"""The page at /: what it may load, what it shows of a server, and that it can be used, in a browser."""

import re
import shutil
from pathlib import Path

import pytest

from inlay import Bank, load_adapter, predict, segment
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.page import HEADERS, PAGE
from inlay.serve.server.service import Service, open_bank
from serve.banked import GPT2, SAM, VIT, pair, save
from serve.server.browser import CHROMIUM, open_browser
from serve.server.clients import open_client, png
from serve.server.live import listen
from serve.server.test_scans import make_mask
from serve.test_tasks import save_channels, save_volumes, scan

ODD = "it's <img src=x onerror=alert(1)> & $(x)"  # a name that is a trap where it is taken for HTML or for shell
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = pair(VIT, "lora", tmp_path_factory.mktemp("shown"))
    shutil.copytree(folder / "a", folder / ODD)
    save(GPT2, ("lora", 2), folder / "text")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_but_its_own(folder):
    with open_client(folder, api_key="secret") as client:
        answer = client.get("/")
    assert answer.status_code == 200 and answer.text == PAGE
    policy = answer.headers["Content-Security-Policy"]
    assert policy == HEADERS["Content-Security-Policy"] and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"https?://|src=|href=\"|@import|\burl\(|\son\w+=|\sstyle=|innerHTML|eval", PAGE)


def test_what_the_page_asks_for_needs_the_key_and_tells_nothing_of_the_machine(folder):
    with open_client(folder, api_key="secret") as client:
        assert client.get("/page/about").status_code == 401
        about = client.get("/page/about", headers={"Authorization": "Bearer secret"})
    assert str(folder) not in about.text
    found = about.json()
    assert found["task"] == "image-classification" and found["action"] == "classify" and found["base"] == VIT
    assert found["adapters"] == ["a", "b", ODD] and list(found["refused"]) == ["text"]
    assert next(field for field in found["inputs"] if field["name"] == "image")["datatype"] == "BYTES"


@needs_browser
def test_an_image_is_dropped_and_its_labels_are_shown(folder, page, tmp_path):
    image = tmp_path / "it's mine.png"
    image.write_bytes(png())
    expected, = predict(load_adapter(folder / "a"), [image])  # fmt: skip
    service = Service(Bank(VIT, folder, skip_unfit=True), ServiceConfig())
    with listen(make_app(service, api_key="secret")) as (host, port):
        address = f"http://{host}:{port}/"
        page.open(address)
        page.wait_for("document.activeElement?.id == 'secret'")
        for key, shown in (("wrong", "find('wrong').textContent"), ("secret", "!find('main').hidden")):
            page.run(f"find('secret').value = {key!r}")
            page.press("Enter", "\r")  # as somebody without a mouse
            page.wait_for(shown)
        assert page.run("[...find('adapter').options].map(o => o.textContent)") == ["a", "b", ODD]

        page.drop(".drop", image)
        page.wait_for("image")
        page.click("#go")
        page.wait_for("document.querySelector('.bars')")
        bars = page.run("[...document.querySelectorAll('.bars li')].map(li => li.innerText.split('\\n'))")
        assert [label for label, _ in bars] == expected.labels
        shown = [float(percent.removesuffix(" %")) for _, percent in bars]
        assert shown == pytest.approx([100 * value for value in expected.probabilities], abs=0.06)

        page.run(f"find('adapter').value = {ODD!r}; find('ask').dispatchEvent(new Event('input'))")
        page.click("#go")
        page.wait_for(f"find('answer').innerText.includes({ODD!r})")
        curl = page.run("find('curl').textContent")
        assert '-H "Authorization: Bearer $INLAY_API_KEY"' in curl and "secret" not in curl
        assert r"""-F 'model=it'\''s <img src=x onerror=alert(1)> & $(x)'""" in curl
        assert r"""-F 'image=@it'\''s mine.png'""" in curl
        page.photograph(tmp_path / "dark.png", dark=True, width=390)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"
        assert all(asked.startswith(address) for asked in page.asked())
        assert [error for error in page.errors() if "401" not in str(error)] == []


@needs_browser
def test_a_refusal_is_shown_as_the_server_says_it(folder, page, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    service = Service(Bank(VIT, folder, skip_unfit=True), ServiceConfig())
    with listen(make_app(service)) as (host, port):
        page.open(f"http://{host}:{port}/")
        page.wait_for("document.getElementById('main')?.hidden === false")
        page.drop(".drop", tmp_path / "no.png")
        page.click("#go")
        page.wait_for("find('answer').querySelector('.bad')")
        assert "cannot be read as an image" in page.run("find('answer').innerText")
        assert "text: adapter 'text' was trained on" in page.run("find('refused').innerText")


@needs_browser
def test_a_text_is_streamed(page, tmp_path):
    save(GPT2, ("lora", 2), tmp_path / "text")
    service = Service(Bank(GPT2, tmp_path), ServiceConfig())
    with listen(make_app(service)) as (host, port):
        page.open(f"http://{host}:{port}/")
        page.wait_for("document.getElementById('main')?.hidden === false")
        page.run("find('in-prompt').value = 'name[Aromi]'; find('in-max_tokens').value = 5")
        page.click("#go")
        page.wait_for("find('text') && !find('go').disabled")
        shown = page.run("find('text').textContent")
        alone = page.run(
            "request('v1/completions', {method: 'POST', body: JSON.stringify({model: 'text', prompt: 'name[Aromi]', "
            "max_tokens: 5, temperature: 0}), headers: {'Content-Type': 'application/json'}}).then(r => r.json())"
        )
        assert shown == "name[Aromi]" + alone["choices"][0]["text"]
        assert page.errors() == []


@needs_browser
def test_each_channel_of_a_scan_has_a_place_for_its_file(page, tmp_path):
    folder = save_channels(save_volumes(tmp_path / "served"))
    for i, name in enumerate(("flair", "t1", "mask")):
        (tmp_path / f"{name}.nii").write_bytes(scan(i) if name != "mask" else make_mask([1]))
    expected = segment(load_adapter(folder / "two"), {name: tmp_path / f"{name}.nii" for name in ("flair", "t1")})
    service = Service(open_bank(SAM, folder), ServiceConfig())
    with listen(make_app(service)) as (host, port):
        page.open(f"http://{host}:{port}/")
        page.wait_for("document.getElementById('main')?.hidden === false")
        titles = "[...document.querySelectorAll('.title')].map(title => title.textContent)"
        assert page.run(titles) == ["Scan", "Mask"]
        page.run("find('adapter').value = 'two'; find('adapter').dispatchEvent(new Event('input', {bubbles: true}))")
        assert page.run(titles) == ["Scan", "Scan flair", "Scan t1", "Mask"]
        assert "-F scan=@FILE" in page.run("find('curl').textContent")
        for name in ("flair", "t1"):
            page.drop(f"[for=in-scan_{name}]", tmp_path / f"{name}.nii")
        page.drop("[for=in-mask]", tmp_path / "mask.nii")
        page.wait_for("find('curl').textContent.includes('mask=@mask.nii')")
        page.click("[aria-label='Remove the file of Mask']")
        curl = page.run("find('curl').textContent")
        assert "-F scan_flair=@flair.nii" in curl and "-F scan_t1=@t1.nii" in curl
        assert "mask" not in curl and "scan=" not in curl
        page.click("#go")
        page.wait_for("document.querySelector('#answer table')")
        shown = page.run("document.querySelector('#answer td').textContent")
        assert float(shown.removesuffix(" ml")) == pytest.approx(expected.volumes_ml["tumour"], rel=1e-3)
        page.photograph(tmp_path / "channels.png", height=1100)
        assert page.errors() == []


def test_the_page_is_in_the_package():
    assert (Path(make_app.__code__.co_filename).parent / "page.html").is_file()
