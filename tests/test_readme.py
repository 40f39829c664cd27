"""What the README says of the code is what the code says."""

from conftest import ROOT
from inlay.methods import METHODS


def test_the_table_of_methods_is_that_of_the_code():
    text = (ROOT / "README.md").read_text()
    for name, method in METHODS.items():
        cells = [name, method.paper, method.attaches, method.width, "yes" if method.merges else "no"]
        assert f"| {' | '.join([*cells, ', '.join(method.bases)])} |" in text
