"""What the methods are called, where they attach, and whose they are: for cards and indexes."""

from typing import Any

# What a method is called, and whose it is.
_METHODS = {
    "LORA": ("LoRA", "Hu et al. 2021, arXiv:2106.09685"),
    "IA3": ("IA3", "Liu et al. 2022, arXiv:2205.05638"),
    "INLAY_SPATIAL3D": ("3D spatial", "Gong et al. 2023, arXiv:2306.13465"),
    "PREFIX_TUNING": ("Prefix tuning", "Li & Liang 2021, arXiv:2101.00190"),
    "PROMPT_TUNING": ("Prompt tuning", "Lester et al. 2021, arXiv:2104.08691"),
    "INLAY_ATTENTION_PREFIX": ("Attention prefix", "Li & Liang 2021, arXiv:2101.00190"),
    "INLAY_BOTTLENECK": ("Bottleneck", "Houlsby et al. 2019, arXiv:1902.00751"),
    "INLAY_COMPOSITE": ("Composite", ""),
    "INLAY_PARTIAL": ("Partial fine-tuning", "Yosinski et al. 2014, arXiv:1411.1792"),
    "INLAY_VISUAL_PROMPT": ("Visual prompt", "Jia et al. 2022, arXiv:2203.12119"),
}
_VARIANTS = {
    "use_dora": "Liu et al. 2024 (DoRA), arXiv:2402.09353",
    "use_rslora": "Kalajdzievski 2023 (rsLoRA), arXiv:2312.03732",
}


def method_name(config: dict[str, Any]) -> str:
    """What the method of an adapter_config.json is called; of a composite with its parts."""
    kind = str(config["peft_type"])
    name = _METHODS.get(kind, (kind, ""))[0]
    parts = [method_name(part) for part in config.get("parts", [])]
    return f"{name} of {' and '.join(parts)}" if parts else name


def places(record: dict[str, Any], config: dict[str, Any]) -> str:
    """The method, its width, and the modules that it attaches to."""
    wide = {"r": "rank", "lora_alpha": "alpha", "width": "width", "length": "length", "num_virtual_tokens": "tokens"}
    lines = []
    for part in config.get("parts") or [config]:
        sizes = [f"{name} {part[key]}" for key, name in wide.items() if part.get(key) is not None]
        targets = part.get("target_modules") or []
        leaves = [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
        at = f"attached to {', '.join(f'`{leaf}`' for leaf in leaves)}" if leaves else ""
        lines.append("- " + "; ".join(filter(None, (method_name(part), ", ".join(sizes), at))) + ".")
    if record["head"]:
        lines.append(f"- The head, {', '.join(f'`{head}`' for head in record['head'])}, is part of the adapter.")
    base = record["base"]
    size = f"{base['blocks']} blocks of width {base['width']}, " if base.get("blocks") else ""
    lines.append(f"- Base: {base['model_type']}, {size}frozen, held in {base['precision']}.")
    return "\n".join(lines)


def citation(config: dict[str, Any]) -> str:
    """The papers of a method, with links, by which the Hub finds it too."""
    parts = config.get("parts") or [config]
    papers = [_METHODS.get(str(part["peft_type"]), ("", ""))[1] for part in parts]
    papers += [paper for part in parts for key, paper in _VARIANTS.items() if part.get(key)]
    said = [
        f"[{paper}](https://arxiv.org/abs/{paper.rpartition('arXiv:')[2]})" for paper in dict.fromkeys(papers) if paper
    ]
    return "; ".join([*said, "[peft](https://github.com/huggingface/peft)"]) + ". Trained with inlay."
