"""A prepared batch of texts is not read by its step, and its loss is that of a batch that is."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from host_reads import DeviceTensors
from inlay.tasks.text import chunked_logits
from inlay.tasks.text import loss as loss_module
from inlay.tasks.text.loss import NextToken

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def full_batch():
    ids = torch.randint(1, 40, (2, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def padded_batch():
    batch = full_batch()
    batch["attention_mask"][1, 6:], batch["labels"][1, 6:], batch["labels"][:, :3] = 0, -100, -100
    return batch


def packed_batch():
    batch = full_batch()
    del batch["attention_mask"]
    return batch | {"position_ids": torch.tensor([[*range(4), *range(6)], [*range(10)]])}


def unlabelled_batch():
    return full_batch() | {"labels": torch.full((2, 10), -100)}


@pytest.mark.parametrize("chunk", [2**24, 200])
@pytest.mark.parametrize("make", [full_batch, padded_batch, packed_batch, unlabelled_batch])
def test_a_prepared_batch_is_not_read(make, chunk, monkeypatch):
    for module in (chunked_logits, loss_module):
        monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=1, **SIZES))
    loss, batch = NextToken(), make()
    expected = loss(model, batch).loss  # also compares a new model in chunks with the whole one, which reads
    prepared = loss.prepare(batch)
    monkeypatch.setattr("inlay.bases.attention_masks.is_asynchronous", lambda device: True)
    reads = []
    mode = DeviceTensors(reads)
    mode.there |= dict.fromkeys((*batch.values(), prepared["learned"].places), True)
    with mode:
        found = loss(model, prepared).loss
        found.backward()
    assert reads == []
    assert torch.equal(found, expected)


def test_an_unprepared_batch_is_read():
    reads, batch = [], padded_batch()
    mode = DeviceTensors(reads)
    mode.there |= dict.fromkeys(batch.values(), True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=1, **SIZES))
    with mode:
        NextToken()(model, batch)
    assert "aten.nonzero.default" in {operation for operation, *_ in reads}
