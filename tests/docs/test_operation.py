"""The page on the operation of a server: what it shows starts what the code takes, and its tables are right."""

import configparser
import inspect
import json
import re
import shlex
import tomllib

import pytest
import typer
import yaml

from docs.blocks import read_blocks
from inlay import Bank
from inlay.cli import app as cli
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.gate import BODIES, KEY, OPEN_PATHS
from inlay.serve.server.metrics import MAX_NAMES
from inlay.serve.server.run import ALIVE, HEADERS_S, run_server
from inlay.serve.server.service import Service
from inlay.tasks.image_decoding import FORMATS
from places import ROOT

PAGE = ROOT / "docs/guides/serve_operation.md"
TEXT = PAGE.read_text()
FILES = {block.title: block.text for block in read_blocks(PAGE) if block.title}
DRAIN_S = inspect.signature(run_server).parameters["drain_s"].default


@pytest.fixture(scope="module")
def app():
    bank = Bank("builtin:vit-tiny", ROOT / "adapters_hub", skip_unfit=True)
    return make_app(Service(bank, ServiceConfig()))


def check_serve(arguments):
    """They are those of the verb."""
    typer.main.get_command(cli.app).commands["serve"].make_context("serve", list(arguments))


def test_the_unit_of_systemd():
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str
    unit.read_string(FILES["inlay.service"])
    service = unit["Service"]
    program, verb, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/inlay") and verb == "serve"
    check_serve(arguments)
    assert int(service["TimeoutStopSec"]) > DRAIN_S
    assert f"# {KEY}=" in FILES["inlay.service"]


def test_the_dockerfile():
    steps = [line.partition(" ") for line in FILES["Dockerfile"].splitlines()]
    said = {step: text for step, _, text in steps}
    assert json.loads(said["ENTRYPOINT"]) == ["inlay", "serve"]
    check_serve(json.loads(said["CMD"]))
    (extra,) = re.findall(r"/src\[(\w+)\]", said["RUN"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert re.search(r"python:(3\.\d+)", said["FROM"])[1] in " ".join(project["classifiers"])
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", said["HEALTHCHECK"])
    assert asked[1] == said["EXPOSE"] and asked[2] in OPEN_PATHS
    compile(json.loads(said["HEALTHCHECK"].partition("CMD ")[2])[2], "HEALTHCHECK", "exec")


def test_the_manifest_of_kubernetes():
    pod = yaml.safe_load(FILES["deployment.yaml"])["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_serve(container["args"])
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    assert container["livenessProbe"]["httpGet"]["path"] == ALIVE
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS
        assert container[probe]["httpGet"]["port"] == container["ports"][0]["containerPort"]


def test_the_settings_of_prometheus():
    (job,) = yaml.safe_load(FILES["prometheus.yml"])["scrape_configs"]
    assert job.keys() <= {"job_name", "static_configs", "authorization"}  # its own default path is /metrics


def test_the_table_of_metrics(app):
    named = set(re.findall(r"`(inlay_\w+)`", TEXT))
    known = {name + "_total" * (kind == "counter") for name, kind in find_metrics(app)}
    assert named - {"inlay_texts"} == known
    assert f"only the first {MAX_NAMES} have series" in TEXT


def find_metrics(app):
    return [(metric.name, metric.type) for metric in app.state.service.metrics.registry.collect()]


def test_the_tables_of_paths_and_bounds(app):
    config = ServiceConfig()
    for words in (
        f"{config.max_body_mb:g} MB; {BODIES} times that",
        f"{config.max_pixels // 10**6} and {config.max_voxels // 10**6} million",
        f"{config.max_tokens:,} and {config.max_new_tokens:,}",
        f"{config.max_queue:,} requests that wait",
        f"{config.timeout_s:g} s until a request is computed",
        f"64 kB; {HEADERS_S} s to arrive",
        f"`--drain-s` ({DRAIN_S:g} s)",
    ):
        assert words in TEXT, words
    assert [kind.upper() for kind in re.search(r"\| image formats \| (.*?);", TEXT)[1].split(", ")] == list(FORMATS)


def test_the_line_of_a_log_has_the_fields_of_the_code():
    (line,) = (json.loads(block.text) for block in read_blocks(PAGE) if block.language == "json")
    source = (ROOT / "src/inlay/serve/server/gate.py").read_text()
    assert all(f'"{name}"' in source for name in line.keys() - {"time", "level", "message"})
