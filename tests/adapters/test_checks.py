"""CHECKS, the one list that loading, `inlay info --verify` and the bank run."""

import pytest

from inlay import Bank, load_adapter, load_base
from inlay.adapters import checks, load, patterns
from inlay.adapters.checks import CHECKS, Check
from inlay.adapters.verify import verify
from inlay.errors import InlayError


def test_each_check_stands_behind_those_that_it_needs():
    names = [check.name for check in CHECKS]
    assert names == ["files", "header", "config", "record", "method", "weights", "base", "patterns", "shapes", "golden"]
    for i, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:i])


def test_loading_verifying_and_the_bank_run_all_of_them(zoo, monkeypatch):
    ran = []

    def recorded(check):
        def run(candidate):
            ran.append(check.name)
            return check.run(candidate)

        return Check(check.name, check.needs, run, check.remark)

    monkeypatch.setattr(checks, "CHECKS", [recorded(check) for check in CHECKS])
    monkeypatch.setattr("inlay.adapters.verify.CHECKS", checks.CHECKS)
    names = [check.name for check in CHECKS]
    for use in (load_adapter, verify, Bank("builtin:vit-tiny").add):
        ran.clear()
        use(zoo)
        assert ran == names


def test_a_check_without_what_it_needs_is_a_mistake_of_ours(zoo):
    candidate = checks.Candidate(checks.Reading(zoo), load.OwnBase(None))
    with pytest.raises(RuntimeError, match="the check 'golden' needs shapes first"):
        checks.run_check(CHECKS[-1], candidate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": lambda r: r.update(golden=[1.0] * 5)}, "its output differs by"),
        ({"record": lambda r: r["preprocessing"].update(image_mean=[0.1, 0.2, 0.3])}, "its output differs by"),
        ({"config": lambda c: c.update(init_lora_weights="pissa")}, "changes the base at each load"),
        ({"config": lambda c: c.update(r=5)}, r"should be \(5, 96\), the file has \(4, 96\)"),
        ({"config": lambda c: c.update(target_modules="(.*)*(.*)*(.*)*(.*)*(.*)*b")}, "did not finish on this base's"),
        ({"record": lambda r: r["base"].update(blocks=7)}, "blocks 7"),
    ],
)
def test_a_bank_refuses_what_loading_refuses(change, message, zoo, rewrite, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    rewrite(zoo, **change)
    bank = Bank("builtin:vit-tiny")
    for use in (load_adapter, bank.add):
        with pytest.raises(InlayError, match=message):
            use(zoo)
    assert bank.names == bank.resident == [] and not bank.files and not bank.checks


def test_the_base_is_loaded_at_the_revision_that_it_was_trained_on(zoo, rewrite, monkeypatch):
    rewrite(zoo, record=lambda r: r["base"].update(revision="0123abc"))
    asked = []

    def of_config(name, where, revision):
        asked.append(revision)
        return read_config(name, resolve_base(name), None)

    def of_weights(name, *, revision=None, **settings):
        asked.append(revision)
        return load_base(name, **settings)

    read_config, resolve_base = load.read_config, load.resolve_base
    monkeypatch.setattr(load, "resolve_base", lambda name: "user/name")  # as if it were on the Hub
    monkeypatch.setattr(load, "read_config", of_config)
    monkeypatch.setattr(load, "load_base", of_weights)
    load_adapter(zoo)
    assert asked == ["0123abc", "0123abc"]
    asked.clear()
    load_adapter(zoo, base="builtin:vit-tiny")  # the user's own choice
    assert asked == [None, None]


def test_a_folder_stands_for_a_base_of_the_hub_whatever_its_revision(zoo, rewrite):
    rewrite(zoo, record=lambda r: r["base"].update(revision="0123abc"))
    assert load_adapter(zoo).verified
