"""The verbs of the `inlay` command for adapters from elsewhere: verify, import."""

import json
from dataclasses import asdict

import typer


def printable(text: str) -> str:
    """Without control characters: names and labels of an adapter are anyone's, and a terminal obeys some."""
    return "".join(c if c.isprintable() else "�" for c in text)


def show_checks(adapter: str, base: str | None, as_json: bool) -> None:
    """Print what `verify` found, a line each, and leave with exit status 1 if anything failed."""
    from inlay.store.verify import verify

    checks = verify(adapter, base)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            print(printable(f"{check.what:<15}{check.result:<14}{check.remark}").rstrip())
    if any(check.result == "failed" for check in checks):
        raise typer.Exit(1)


VERBS: dict = {}
