import pytest

from inlay import InlayError, TrainConfig, load_base
from inlay.compare import Compared, compare_images, table
from inlay.methods import METHODS


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "vision" in method.bases])
def test_a_method_trains_what_it_says(name):
    model = load_base("builtin:vit-tiny", labels=["a", "b"])
    frozen = {id(p) for n, p in model.named_parameters() if not n.startswith("classifier")}
    trained = {n: p for n, p in METHODS[name].adapt(model, 4).named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in trained)
    assert any(id(p) in frozen for p in trained.values()) == (name == "full")
    assert any("classifier" not in n for n in trained) == (name != "probe")


def test_unknown_methods_and_no_seeds_are_refused(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(InlayError, match="probe, lora"):
        compare_images("builtin:vit-tiny", "builtin:digits", config, methods=["nothing"])
    with pytest.raises(InlayError, match="one seed or more"):
        compare_images("builtin:vit-tiny", "builtin:digits", config, seeds=[])
    assert not (tmp_path / "run").exists()


def test_table_gives_mean_and_spread():
    rows = [
        Compared("lora", 2e-3, 12_345, {"accuracy": [0.9, 0.8, 1.0]}, 4.0, 56_400),
        Compared("probe", 1e-2, 970, {"accuracy": [0.5]}, 9.0, 4_300),
    ]
    assert table(rows).splitlines()[2:] == [
        "| lora | 12,345 | 0.002 | 0.9000 ± 0.1000 | 250 | 56 |",
        "| probe | 970 | 0.01 | 0.5000 | 111 | 4 |",
    ]
