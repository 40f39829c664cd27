"""What a run stores: exact resumption in process, small checkpoints, the best weights."""

import pytest
import torch
from points import Interrupted, different, log_of, same, stop_at, train
from train_job import Net, trainable

from inlay import InlayError
from inlay.tasks.metrics import Accuracy

# ----- resumption in process


def dtypes(values):
    """All dtypes in a tree of dicts."""
    if isinstance(values, dict):
        return set().union(*map(dtypes, values.values()))
    return {values.dtype} if isinstance(values, torch.Tensor) else set()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_every_optimizer_resumes_exactly_in_mid_interval(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "save_every": 4, "eval_every": 7, "precision": "no"}
    whole, stopped, resumed = Net(0.3), Net(0.3), Net(0.3)
    train(tmp_path / "whole", whole, **settings)
    stop_at(stopped, 7)
    with pytest.raises(Interrupted):
        train(tmp_path / "other", stopped, **settings)
    if optimizer == "adamw8bit":
        stored = torch.load(tmp_path / "other" / "last" / "optimizer.bin", weights_only=True)
        assert torch.uint8 in dtypes(stored["state"]), "no moment is in 8 bits"
    assert train(tmp_path / "other", resumed, **settings).resumed
    same(whole, resumed)
    assert log_of(tmp_path / "other") == log_of(tmp_path / "whole")
    assert different(whole, Net(0.3))


def test_checkpoints_hold_the_trainable_weights_alone(tmp_path):
    net = Net()
    stop_at(net, 10)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", net, save_every=3)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.parent.name for p in files} == {"run", "last", "best"}
    weights = sum(w.numel() * 4 for w in trainable(net).values())
    assert sum(p.stat().st_size for p in files) < 4 * weights + 40_000 < net.ballast.numel()
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in files if p.parent.name != "run")
    train(tmp_path / "run", Net(), save_every=3)
    assert not (tmp_path / "run" / "last").exists()
    assert (tmp_path / "run" / "finished.json").is_file()


# ----- the best weights


class Scripted(Accuracy):
    """Gives the scores it is told, and keeps the weights that it gave them for."""

    def __init__(self, net, scores):
        super().__init__()
        self.net, self.scores, self.seen = net, list(scores), []

    def _compute(self, predictions, references):
        self.seen.append(trainable(self.net))
        return {"score": self.scores[len(self.seen) - 1]}


def test_patience_stops_and_the_best_weights_are_kept(tmp_path):
    net = Net()
    script = Scripted(net, [0.1, 0.5, 0.5, 0.4, 0.9])
    result = train(tmp_path / "run", net, metrics=[script], eval_every=2, patience=2)
    assert (result.steps, result.best_step, result.metrics["score"]) == (8, 4, 0.5)
    assert [row["score"] for row in result.history] == [0.1, 0.5, 0.5, 0.4]
    same(trainable(net), script.seen[1])
    assert not torch.equal(script.seen[1]["head.weight"], script.seen[3]["head.weight"])


def test_weights_that_no_later_ones_beat_are_those_of_the_start(tmp_path):
    net, start = Net(), trainable(Net())
    script = Scripted(net, [0.5, 0.2, 0.4])
    result = train(tmp_path / "run", net, metrics=[script], eval_every=6, steps=12, eval_start=True)
    assert [row["step"] for row in result.history] == [0, 6, 12] and "train_loss" not in result.history[0]
    assert (result.best_step, result.metrics["score"]) == (0, 0.5)
    same(trainable(net), start)


class Several(Scripted):
    """Gives two scores, of which the second falls while the first rises."""

    def _compute(self, predictions, references):
        score = super()._compute(predictions, references)["score"]
        return {"other": -score, "score": score}


def test_the_score_that_is_named_chooses_the_best_step_wherever_it_stands(tmp_path):
    net, scores = Net(), [0.1, 0.5, 0.9, 0.4, 0.3]

    def best(folder, metric, **more):
        return train(tmp_path / folder, net, metrics=[metric], eval_every=4, **more).best_step

    with pytest.raises(InlayError, match="gives other, score; name the score"):
        best("unnamed", Several(net, scores))
    assert best("score", Several(net, scores), best_by="score") == 12
    assert best("other", Several(net, scores), best_by="other") == 4
    named = Several(net, scores)
    named.score_name = "score"
    assert best("declared", named) == 12
    with pytest.raises(InlayError, match="unknown score 'f1' in best_by; the metrics give other, score"):
        best("wrong", Several(net, scores), best_by="f1")
    with pytest.raises(InlayError, match="no metrics"):
        train(tmp_path / "none", net, best_by="f1")


def test_patience_counts_on_after_a_resumption(tmp_path):
    scores, net = [0.1, 0.5, 0.5, 0.4, 0.9], Net()
    stop_at(net, 7)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", net, metrics=[Scripted(net, scores)], eval_every=2, patience=2)
    again = Net()
    result = train(tmp_path / "run", again, metrics=[Scripted(again, scores[3:])], eval_every=2, patience=2)
    assert (result.steps, result.best_step) == (8, 4)


def test_without_metrics_less_loss_is_better_and_without_validation_the_last_weights_are_kept(tmp_path):
    result = train(tmp_path / "loss", Net(), eval_every=3, learning_rate=0.2)
    losses = {row["step"]: row["loss"] for row in result.history}
    assert result.best_step == min(losses, key=losses.get)
    whole, read = Net(), Net()
    first = train(tmp_path / "none", whole, validation=None)
    assert first.best_step == first.steps
    again = train(tmp_path / "none", read, validation=None)
    assert again.resumed
    same(whole, read)


def test_batch_norms_keep_the_statistics_of_the_base(tmp_path):
    net = Net(norm=True)
    before = {name: b.clone() for name, b in net.named_buffers()}
    assert {name.split(".")[-1] for name in before} == {"running_mean", "running_var", "num_batches_tracked"}
    train(tmp_path / "run", net)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
