"""What `fit` would write for a model and its validation data."""

from accelerate import Accelerator
from torch.utils.data import DataLoader

from inlay.train.evaluation import evaluate_on
from inlay.train.losses import ModelLoss


def recipe_scores(model, view, metrics, *, loss=None, collate=None, batch_size=4):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(view, batch_size=batch_size, collate_fn=collate))
    scores, _ = evaluate_on(model, loader, loss or ModelLoss(), metrics, accelerator)
    model.eval()
    return scores
