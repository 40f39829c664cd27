"""The loss of the next token, and batches of texts of about one length."""

import pytest
import torch
from torch.nn.functional import log_softmax
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from inlay import TrainConfig, fit
from inlay.tasks.text.loss import NextToken
from inlay.train.sampler import GROUP, SeededSampler

VOCABULARY = 30


def language_model(seed=0):
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY, **quiet))


class Texts(Dataset):
    """Random prompts and completions of 4 to 40 tokens."""

    def __init__(self, rows, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(4, 41, (rows,), generator=generator).tolist()
        self.ids = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in self.lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        labels = ids.clone()
        labels[: len(ids) // 2] = -100
        return {"input_ids": ids, "labels": labels}

    def collate(self, items):
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([item["input_ids"] for item in items], batch_first=True)
        mask = pad([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
        labels = pad([item["labels"] for item in items], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_it_is_the_models_own_loss_and_needs_fewer_logits():
    model, data = language_model().eval(), Texts(6)
    batch = data.collate([data[i] for i in range(6)])
    ours, own = NextToken()(model, batch), model(**batch)
    assert ours.loss.item() == pytest.approx(own.loss.item(), abs=1e-6)
    first = min(len(data[i]["input_ids"]) // 2 for i in range(6))
    assert ours.logits.shape[1] == batch["labels"].shape[1] - first
    assert NextToken().weight(batch) == int((batch["labels"] != -100).sum())


def test_smoothing_is_that_of_the_lora_paper_and_of_training_alone():
    """(1 - s) of the label's log-probability and s of the mean over the vocabulary (loralib's examples/NLG)."""
    model, data, s = language_model(), Texts(3), 0.1
    batch = data.collate([data[i] for i in range(3)])
    logits = log_softmax(model(**batch).logits[:, :-1], -1)
    labels = batch["labels"][:, 1:]
    learned = labels != -100
    label = -logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0][learned].mean()
    uniform = -logits.mean(-1)[learned].mean()
    smooth = NextToken(s)
    assert smooth(model.train(), batch).loss.item() == pytest.approx(((1 - s) * label + s * uniform).item(), abs=1e-6)
    assert smooth(model.eval(), batch).loss.item() == pytest.approx(label.item(), abs=1e-6)


def test_every_example_comes_once_an_epoch_in_batches_of_about_one_length():
    data = Texts(1000)
    order = SeededSampler(1000, 10, 100, seed=3, lengths=data.lengths)
    batches = [[index for index, _ in batch] for batch in order]
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    padded = sum(10 * max(data.lengths[i] for i in batch) for batch in batches)
    assert sum(data.lengths) / padded > 0.97, "more than 3 % of the batches is padding"
    at_random = [[index for index, _ in batch] for batch in SeededSampler(1000, 10, 100, seed=3)]
    assert sum(data.lengths) / sum(10 * max(data.lengths[i] for i in batch) for batch in at_random) < 0.65
    means = [sum(data.lengths[i] for i in batch) for batch in batches]
    assert means != sorted(means), "batches come in the order of their length"


@pytest.mark.parametrize("done", [1, GROUP - 1, GROUP, GROUP + 5])
def test_a_resumed_order_is_the_rest_of_the_whole_one(done):
    lengths = Texts(90).lengths
    whole = list(SeededSampler(90, 7, 2 * GROUP + 3, seed=1, lengths=lengths))
    assert list(SeededSampler(90, 7, 2 * GROUP + 3, seed=1, done=done, lengths=lengths)) == whole[done:]


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    """Every token counts alike, also where one piece holds more of them than the other."""
    data, weights = Texts(64), {}
    for accumulate in (1, 4):
        model = language_model()
        config = TrainConfig(str(tmp_path / str(accumulate)), epochs=1, batch_size=16, accumulate=accumulate, workers=0)
        fit(model, data, Texts(9, seed=1), config, collate=data.collate, loss=NextToken())
        weights[accumulate] = torch.cat([p.flatten() for p in model.parameters()])
    assert (weights[1] - weights[4]).abs().max() < 2e-5


class Unlabelled(Texts):
    """Two of three texts are prompts to their end, as those whose completion was cut off."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index % 3:
            item["labels"][:] = -100
        return item


def test_a_piece_in_which_nothing_is_learned_adds_nothing(tmp_path):
    """Pieces of one row each, and a batch of two of them, against the model's own loss on the rows with labels."""
    data, held_out, weights = Unlabelled(12), Unlabelled(5, seed=1), {}
    for accumulate in (1, 2):
        model = language_model()
        config = TrainConfig(str(tmp_path / str(accumulate)), epochs=1, batch_size=2, accumulate=accumulate, workers=0)
        result = fit(model, data, held_out, config, collate=data.collate, loss=NextToken())
        weights[accumulate] = torch.cat([p.flatten() for p in model.parameters()])
        with torch.no_grad():
            own = model(**data.collate([held_out[0], held_out[3]])).loss.item()
        assert result.metrics == {"loss": pytest.approx(own, abs=1e-6)}
    assert (weights[1] - weights[2]).abs().max() < 2e-5


@pytest.mark.parametrize("length", [1, 5])
def test_nothing_to_learn_is_a_loss_of_zero(length):
    model = language_model()
    ids = torch.ones(2, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.full_like(ids, -100)}
    output = NextToken()(model, batch)
    output.loss.backward()
    assert output.loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_validation_loss_is_the_mean_over_all_tokens(tmp_path):
    model, data, held_out = language_model(), Texts(16), Texts(11, seed=1)
    config = TrainConfig(str(tmp_path / "run"), epochs=1, batch_size=4, workers=0)
    result = fit(model, data, held_out, config, collate=data.collate, loss=NextToken(0.2))
    with torch.no_grad():
        own = model(**data.collate([held_out[i] for i in range(11)])).loss.item()
    assert result.metrics == {"loss": pytest.approx(own, abs=1e-6)}
