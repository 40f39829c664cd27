"""What adapters are compared with: a linear probe, and the training of all weights. Neither adds anything."""

from inlay.methods.method import EVERY_BASE, Method

PROBE = Method(
    name="probe",
    paper="Alain & Bengio 2016, arXiv:1610.01644",
    attaches="nothing: the head is trained",
    width="none",
    merges=True,
    kind="baseline",
    learning_rate=1e-2,
    config=lambda model, width: None,
    bases=("vision", "conv"),
    trains="head",
)
FULL = Method(
    name="full",
    paper="full fine-tuning, for comparison",
    attaches="everything",
    width="none: every weight",
    merges=True,
    kind="baseline",
    learning_rate=1e-3,
    config=lambda model, width: None,
    bases=(*EVERY_BASE, "diffusion"),
    trains="model",
)
