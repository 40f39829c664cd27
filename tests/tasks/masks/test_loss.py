"""The loss of promptable masks, what metrics see of it, and a simulated user."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from inlay import MaskLoss, load_base
from inlay.builtin.scenes import generate_scenes
from inlay.tasks.masks.clicks import answer_centres, answer_clicks, score_centres, score_clicks
from inlay.tasks.masks.loss import mask_losses, pick_predicted_best
from inlay.tasks.masks.prompts import draw_objects
from inlay.tasks.masks.scores import MaskIoU


def square(size=8, low=2, high=6):
    mask = torch.zeros(size, size)
    mask[low:high, low:high] = 1
    return mask


def test_each_prompt_pays_for_its_best_mask():
    """One right mask of three: by hand, focal loss and Dice of that one, and the error of all predicted IoUs."""
    truth = square()
    right = (truth * 2 - 1) * 4.0
    logits = torch.stack([-right, right, torch.full_like(right, -4.0)])  # the whole but for it, right, nothing
    scores = torch.tensor([0.5, 0.5, 0.5])
    chance = torch.sigmoid(torch.tensor(4.0))
    focal = 20 * -chance.log() * (1 - chance) ** 2
    both = 16 * chance
    dice = 1 - (2 * both + 1) / (16 * chance + 48 * (1 - chance) + 16 + 1)
    expected = focal + dice + (0.25 + 0.25 + 0.25) / 3  # the IoUs are 0, 1 and 0
    assert mask_losses(logits, scores, truth) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(pick_predicted_best(logits, torch.tensor([0.1, 0.7, 0.3])), right)


def test_balanced_entropy_gives_half_to_the_object():
    truth, nothing = square(), torch.full((1, 8, 8), -3.0)
    weights = torch.where(truth == 1, 1 / 16, 1 / 48) / 2
    entropy = nn.functional.binary_cross_entropy_with_logits(nothing[0], truth, reduction="none")
    chance = torch.sigmoid(torch.tensor(-3.0))
    dice = 1 - (2 * 16 * chance + 1) / (64 * chance + 16 + 1)
    expected = float((entropy * weights).sum() + dice + 0.09)
    assert mask_losses(nothing, torch.tensor([0.3]), truth, balanced=True) == pytest.approx(expected, rel=1e-5)


class Fixed(nn.Module):
    """Answers with given masks."""

    def __init__(self, masks, scores):
        super().__init__()
        self.masks, self.scores = masks, scores

    def forward(self, pixel_values, multimask_output):
        return SimpleNamespace(pred_masks=self.masks, iou_scores=self.scores)


def test_masks_that_are_not_asked_for_do_not_count():
    """Two pictures with two prompts, of which one is void; pieces add up to the whole."""
    torch.manual_seed(0)
    labels = torch.stack([torch.stack([square(), square(high=4)]), torch.stack([square(low=4), -torch.ones(8, 8)])])
    masks, scores = torch.randn(2, 2, 3, 8, 8), torch.rand(2, 2, 3)
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "labels": labels.to(torch.int8)}
    loss = MaskLoss()
    output = loss(Fixed(masks, scores), batch)
    each = mask_losses(masks, scores, labels.clamp_min(0))
    assert loss.weight(batch) == 3
    assert float(output.loss) == pytest.approx(float((each[0, 0] + each[0, 1] + each[1, 0]) / 3), rel=1e-6)
    pieces = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    losses = [loss(Fixed(masks[i : i + 1], scores[i : i + 1]), piece).loss for i, piece in enumerate(pieces)]
    total = sum(one * loss.weight(piece) for one, piece in zip(losses, pieces, strict=True)) / 3
    assert torch.allclose(total, output.loss)

    counts, zeros = loss.answers(output, batch)
    assert counts.shape == (2, 2, 2) and zeros.tolist() == [0, 0]
    said, true = pick_predicted_best(masks, scores)[1, 0] > 0, labels[1, 0] > 0
    assert counts[1, 0].tolist() == [int((said & true).sum()), int((said | true).sum())]
    assert counts[1, 1].tolist() == [0, 0]
    metric = MaskIoU()
    metric.add_batch(predictions=counts[:1], references=zeros[:1])  # batches may differ in P
    metric.add_batch(predictions=counts[1:, :1], references=zeros[1:])
    ious = [counts[i, j, 0] / counts[i, j, 1] for i, j in ((0, 0), (0, 1), (1, 0))]
    assert metric.compute()["mean_iou"] == pytest.approx(float(sum(ious) / 3))


def test_the_mean_iou_is_that_of_the_masks_that_were_asked_for():
    """A mask that was not asked for has no pixels at all; one that was missed altogether has a union, and counts."""
    metric = MaskIoU()
    assert metric.compute(predictions=[[[3, 4], [0, 0]], [[0, 0], [0, 8]]]) == {"mean_iou": pytest.approx(0.375)}
    assert metric.compute(predictions=[[[0, 0], [0, 0]]]) == {"mean_iou": 0.0}


def test_a_simulated_user_clicks_where_the_answer_is_wrong():
    torch.manual_seed(0)
    made = generate_scenes(2, seed=4711, kind="cells")
    objects = draw_objects(made, 3)
    seen = []

    def model(image_embeddings, multimask_output, **prompt):
        seen.append(prompt)
        shape = (6, 1, 3 if multimask_output else 1)
        return SimpleNamespace(pred_masks=torch.full((*shape, 64, 64), -1.0), iou_scores=torch.zeros(shape))

    rounds = list(answer_clicks(model, torch.zeros(2, 64, 16, 16), objects, [1, 2]))
    assert [tuple(logits.shape) for logits, _, _ in rounds] == [(6, 3, 64, 64), (6, 1, 64, 64)]
    assert seen[0]["input_points"].shape == (6, 1, 1, 2) and seen[1]["input_points"].shape == (6, 1, 3, 2)
    assert (seen[1]["input_labels"] == 1).all()  # nothing was answered: all errors lie inside
    x, y = seen[0]["input_points"].long().flatten(0, 2).unbind(-1)
    assert objects.flatten(0, 1)[torch.arange(6), y, x].all()
    list(answer_clicks(model, torch.zeros(2, 64, 16, 16), objects, [1], boxes=True))
    assert set(seen[-1]) == {"input_boxes"} and seen[-1]["input_boxes"].shape == (6, 1, 4)


def test_a_simulated_user_clicks_at_the_centres_of_the_largest_errors():
    """First of the object, then of what is missing or too much, with the class that is right there."""
    objects = torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    objects[0, 0, 8:40, 8:40] = True
    objects[0, 1, 20:28, 20:60] = True
    seen = []

    def model(image_embeddings, multimask_output, **prompt):
        """The left of 24 pixels of anything: too much for the first object, too little for the second."""
        seen.append(prompt)
        masks = torch.full((2, 1, 3 if multimask_output else 1, 16, 16), -1.0)
        masks[..., 1:15, :6] = 1.0
        return SimpleNamespace(pred_masks=masks, iou_scores=torch.zeros(masks.shape[:3]))

    rounds = list(answer_centres(model, torch.zeros(1, 8, 4, 4), objects, 2))
    assert [tuple(logits.shape) for logits, _, _ in rounds] == [(2, 3, 16, 16), (2, 1, 16, 16)]
    first, second = (prompt["input_points"][:, 0] for prompt in seen)
    assert (first[0, 0] - 23.5).abs().max() <= 4 and (first[1, 0] - torch.tensor([39.5, 23.5])).abs().max() <= 16
    assert objects[0, [0, 1], first[:, 0, 1].long(), first[:, 0, 0].long()].all() and "input_masks" not in seen[0]
    assert (
        second.shape == (2, 2, 2)
        and torch.equal(second[:, :1], first)
        and seen[1]["input_masks"].shape == (2, 1, 16, 16)
    )
    x, y = second[:, 1].long().unbind(-1)
    right = objects[0, [0, 1], y, x]
    answered = rounds[0][0][[0, 1], 0, y // 4, x // 4] > 0
    assert torch.equal(seen[1]["input_labels"][:, 0, 1] == 1, right) and (right != answered).all()


def test_of_an_answer_that_is_right_nothing_more_is_asked():
    objects = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    objects[..., 16:32, 16:32] = True
    seen = []

    def model(image_embeddings, multimask_output, **prompt):
        seen.append(prompt["input_labels"].flatten().tolist())
        masks = torch.full((1, 1, 1, 16, 16), -1.0)
        masks[..., 4:8, 4:8] = 1.0
        return SimpleNamespace(pred_masks=masks, iou_scores=torch.zeros(1, 1, 1))

    list(answer_centres(model, torch.zeros(1, 8, 4, 4), objects, 3))
    assert seen == [[1], [1, -1], [1, -1, -1]]


@pytest.mark.parametrize("base", ["sam", "sam2"])
def test_ten_clicks_are_scored_for_sam_and_sam_2(base):
    from sam2_models import build_sam2

    torch.manual_seed(0)
    model, side = (build_sam2(), 64) if base == "sam2" else (load_base("builtin:sam-tiny"), 128)
    pixels, objects = torch.randn(2, 3, side, side), torch.zeros(2, 3, side, side, dtype=torch.bool)
    objects[:, :, 10:30, 10:40] = True
    assert score_centres(model, pixels, objects).shape == (10, 6)
    assert {key: tuple(value.shape) for key, value in score_clicks(model, pixels, objects).items()} == {
        "1 point": (6,), "3 points": (6,), "box": (6,),
    }  # fmt: skip


def test_clicks_in_errors_help_the_embedded_sam():
    torch.manual_seed(0)
    made = generate_scenes(8, seed=4712)
    pixels = torch.from_numpy(made.images).permute(0, 3, 1, 2).float() / 57 - 2.1  # about what the processor makes
    found = score_clicks(load_base("builtin:sam-tiny"), pixels, draw_objects(made, 8))
    means = {key: float(value.mean()) for key, value in found.items()}
    assert all(value.shape == (64,) for value in found.values())
    assert means["3 points"] > means["1 point"] + 0.03 and means["box"] > means["1 point"]
    clicked = score_centres(load_base("builtin:sam-tiny"), pixels, draw_objects(made, 8), 3).mean(1)
    assert clicked[2] > clicked[0] + 0.03
