"""Make a model narrower: leave out the units of its layers that matter least, and heal what that costs.

trained = load_trained("runs/lora_vit/adapter")
pruned = prune(trained, "builtin:digits", target="macs=0.5", criterion="taylor", compensate=True)
healed = heal(pruned.trained, "builtin:digits", steps=60)
save_pruned(healed.trained, "runs/pruned", PruneReport(pruned.facts, pruned.kept, healing=healed.facts))
"""

from inlay.compress.prune.carry import carry_adapter
from inlay.compress.prune.criteria import CRITERIA
from inlay.compress.prune.heal import Healed, heal
from inlay.compress.prune.masks import MASKS, mask_weights
from inlay.compress.prune.pruning import Pruned, prune
from inlay.compress.prune.save import PruneReport, save_pruned
from inlay.compress.prune.scan import scan_sensitivity
from inlay.compress.prune.trained import TrainedModel, load_trained

__all__ = [
    "CRITERIA",
    "MASKS",
    "Healed",
    "PruneReport",
    "Pruned",
    "TrainedModel",
    "carry_adapter",
    "heal",
    "load_trained",
    "mask_weights",
    "prune",
    "save_pruned",
    "scan_sensitivity",
]
