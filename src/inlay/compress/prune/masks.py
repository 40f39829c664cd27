"""Set single weights to zero. The tensors keep their shapes, so that nothing is faster; the zeros pack well."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.bases.sites import head_modules, is_linear
from inlay.combine.examples import load_examples
from inlay.compress.prune import Pruned
from inlay.compress.prune.statistics import observe_readers, weight_matrix
from inlay.compress.prune.trained import TrainedModel, load_trained
from inlay.errors import BadInput
