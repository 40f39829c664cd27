"""The methods that work on text-to-image bases, from the first step to the merged pipeline."""

import copy

import pytest
import torch

from diffusion_models import write_pipeline
from inlay import METHODS, InlayError, load_adapter, load_base, merge, save_adapter
from inlay.study.tune.placement import find_adapted_places
from inlay.study.tune.space import list_places
from inlay.tasks import find_task
from inlay.tasks.text_to_image.processor import load_prompt_processor

TASK = find_task("text-to-image")
WORKING = [name for name, method in METHODS.items() if "diffusion" in method.bases and method.trains == "adapter"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A UNet and a transformer: folder, base and processor. They are not changed."""
    where = tmp_path_factory.mktemp("pipelines")
    folders = {kind: write_pipeline(where / kind, kind) for kind in ("sd", "sd3")}
    return {k: (folder, load_base(folder), load_prompt_processor(str(folder), None)) for k, folder in folders.items()}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("method", WORKING)
def test_trained_saved_and_merged_it_computes_the_same(method, kind, places, tmp_path):
    _, base, processor = places[kind]
    batch = TASK.random_inputs(base, processor)
    torch.manual_seed(0)
    model = METHODS[method].adapt(copy.deepcopy(base), 2)
    with torch.no_grad():
        before = base(**batch).prediction
        assert torch.allclose(model.eval()(**batch).prediction, before, atol=1e-6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any(f".{part}." in name for name in trained for part in ("vae", "text_encoder"))
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    for _ in range(2):
        model.train()(**batch).loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model.eval()(**batch).prediction
        assert (after - before).abs().max() > 1e-3
        loaded = load_adapter(save_adapter(model, tmp_path / "adapter", processor=processor))
        assert loaded.deviation < 1e-4
        assert torch.allclose(loaded.model(**batch).prediction, after, atol=1e-5)
        assert METHODS[method].merges
        merged = load_base(merge(tmp_path / "adapter", tmp_path / "merged").folder)
        assert torch.allclose(merged(**batch).prediction, after, atol=1e-4)


def test_full_fine_tuning_trains_the_denoiser(places):
    _, base, processor = places["sd"]
    model = METHODS["full"].adapt(copy.deepcopy(base), 0)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"unet"}
    model(**TASK.random_inputs(base, processor)).loss.backward()
    assert all(p.grad is not None for p in model.unet.parameters())


def test_methods_that_attach_to_a_stack_of_blocks_are_refused_in_one_sentence(places):
    _, base, _ = places["sd"]
    for name, method in METHODS.items():
        if "diffusion" not in method.bases and name not in ("probe", "prompt", "prefix", "pissa"):
            with pytest.raises(InlayError, match=r"text-to-image pipeline|no mask decoder|vision encoder|is no SAM"):
                method.adapt(copy.deepcopy(base), 2)


def test_a_search_has_one_place(places):
    _, base, _ = places["sd"]
    assert [place.blocks for place in list_places(base)] == [None]
    assert find_adapted_places(METHODS["lora"].adapt(copy.deepcopy(base), 2)) == set()
