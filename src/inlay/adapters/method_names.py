"""What the methods are called, where they attach, and whose they are: for cards and indexes."""

from typing import Any

from inlay.peft_types import PEFT_TYPES


def name_method(config: dict[str, Any]) -> str:
    """What the method of an adapter_config.json is called; of a composite with its parts."""
    kind = str(config["peft_type"])
    name = PEFT_TYPES[kind].name if kind in PEFT_TYPES else kind
    parts = [name_method(part) for part in config.get("parts", [])]
    return f"{name} of {' and '.join(parts)}" if parts else name


def describe_sites(record: dict[str, Any], config: dict[str, Any]) -> str:
    """The method, its width, and the modules that it attaches to."""
    wide = {"r": "rank", "lora_alpha": "alpha", "width": "width", "length": "length", "num_virtual_tokens": "tokens"}
    lines = []
    for part in config.get("parts") or [config]:
        sizes = [f"{name} {part[key]}" for key, name in wide.items() if part.get(key) is not None]
        targets = part.get("target_modules") or []
        leaves = [targets] if isinstance(targets, str) else sorted({shorten_layer(name) for name in targets})
        at = f"attached to {', '.join(f'`{leaf}`' for leaf in leaves)}" if leaves else ""
        lines.append("- " + "; ".join(filter(None, (name_method(part), ", ".join(sizes), at))) + ".")
    if record["head"]:
        lines.append(f"- The head, {', '.join(f'`{head}`' for head in record['head'])}, is part of the adapter.")
    base = record["base"]
    size = f"{base['blocks']} blocks of width {base['width']}, " if base.get("blocks") else ""
    lines.append(f"- Base: {base['model_type']}, {size}frozen, held in {base['precision']}.")
    if base.get("batch_norms"):
        lines.append(
            f"- Its {base['batch_norms']} batch norms keep the base's running statistics; they were frozen in training."
        )
    return "\n".join(lines)


def shorten_layer(name: str) -> str:
    """The last word of a module's name, and the one before it where that is a number: `to_out.0`."""
    *rest, last = name.split(".")
    return ".".join([*rest[-1:], last]) if last.isdigit() else last


def cite_method(config: dict[str, Any]) -> str:
    """The papers of a method, with links, by which the Hub finds it too."""
    parts = config.get("parts") or [config]
    known = [(PEFT_TYPES[str(part["peft_type"])], part) for part in parts if str(part["peft_type"]) in PEFT_TYPES]
    papers = [facts.paper for facts, _ in known]
    for facts, part in known:
        for setting, variant in facts.variants.items():
            if part.get(setting):
                authors, comma, number = variant.paper.partition(",")
                papers.append(f"{authors} ({variant.name}){comma}{number}")
    said = [
        f"[{paper}](https://arxiv.org/abs/{paper.rpartition('arXiv:')[2]})" for paper in dict.fromkeys(papers) if paper
    ]
    return "; ".join([*said, "[peft](https://github.com/huggingface/peft)"]) + ". Trained with inlay."
