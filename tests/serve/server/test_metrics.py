"""What a scrape of /metrics says of requests, batches and adapters, and how many series clients can make."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inlay.serve.server import metrics as metrics_module
from inlay.serve.server.queue import Request
from serve.banked import VIT, pair, save
from serve.server.clients import ask, open_client


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("counted"))


def scrape(client, **headers):
    """Values by the name of the sample and its labels."""
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def count(found, name, **labels):
    return found.get((name, *sorted(labels.items())), 0.0)


def test_requests_batches_and_latency_are_counted(folder):
    with open_client(folder) as client:
        for name in ("a", "a", "b"):
            assert ask(client, name).status_code == 200
        assert ask(client, "a", b"no image").status_code == 400
        found = scrape(client)
        route = "/v1/classify"
        assert count(found, "inlay_requests_total", route=route, adapter="a", status="200") == 2
        assert count(found, "inlay_requests_total", route=route, adapter="b", status="200") == 1
        assert count(found, "inlay_requests_total", route=route, adapter="a", status="400") == 1
        assert count(found, "inlay_refusals_total", kind="DamagedFile") == 1
        seconds = {}
        for part in ("waiting", "computing", "whole"):
            assert count(found, "inlay_request_seconds_count", adapter="a", part=part) == 2  # refusals are no latency
            seconds[part] = count(found, "inlay_request_seconds_sum", adapter="a", part=part)
        assert 0 < seconds["waiting"] + seconds["computing"] < seconds["whole"]
        assert count(found, "inlay_batch_rows_count") == count(found, "inlay_batch_adapters_count") == 3
        assert count(found, "inlay_adapters") == count(found, "inlay_adapters_resident") == 2
        assert count(found, "inlay_adapters_bytes") == client.app.state.service.bank.bytes
        assert count(found, "inlay_queue_length") == 0


def test_a_mixed_batch(folder):
    with open_client(folder) as client:
        service = client.app.state.service
        service.metrics.count_batch([Request(name, "", None) for name in "aab"])
        found = scrape(client)
        assert count(found, "inlay_batch_rows_sum") == 3 and count(found, "inlay_batch_adapters_sum") == 2


def test_adapters_that_give_way_are_counted(folder):
    with open_client(folder) as client:
        each = client.app.state.service.bank.bytes / 3 / 1e6  # two adapters and the base's slot
    with open_client(folder, budget_mb=2.5 * each) as client:  # room for one of two
        for name in "abab":
            assert ask(client, name).status_code == 200
        found = scrape(client)
        assert count(found, "inlay_adapters") == 2 and count(found, "inlay_adapters_resident") == 1
        assert count(found, "inlay_adapter_loads_total") == 4 and count(found, "inlay_adapter_evictions_total") == 3


def test_names_that_clients_make_up_become_no_series(folder):
    with open_client(folder) as client:
        before = set(scrape(client))
        for index in range(5):
            assert ask(client, f"made-up-{index}").status_code == 404
            client.get(f"/made/up/{index}")
            client.request("MADEUP", "/v1/classify")
        text = client.get("/metrics").text
        assert "made" not in text.lower()
        fresh = {key for key in set(scrape(client)) - before if not key[0].endswith("_created")}
        assert len(fresh) == 5  # routes with their statuses, among them that of the scrape; one kind of refusal


def test_only_so_many_adapters_have_series_and_those_of_a_removed_one_go(folder, monkeypatch):
    monkeypatch.setattr(metrics_module, "MAX_NAMES", 1)
    with open_client(folder) as client:
        ask(client, "b")
        ask(client, "a")
        labels = set(re.findall(r'inlay_requests_total{adapter="([^"]*)"', client.get("/metrics").text))
        assert {"b", "(others)"} <= labels and "a" not in labels
        client.app.state.service.remove_adapter("b")
        ask(client, "a")
        labels = set(re.findall(r'inlay_\w+{adapter="([^"]*)"', client.get("/metrics").text))
        assert "a" in labels and "b" not in labels


def test_an_adapter_that_is_read_again_counts_as_loaded(folder, tmp_path):
    save(VIT, ("lora", 2), tmp_path / "c", seed=3)
    with open_client(folder) as client:
        client.app.state.service.add_adapter(tmp_path / "c", "c")
        found = scrape(client)
        assert count(found, "inlay_adapter_loads_total") == 3 and count(found, "inlay_adapters") == 3
