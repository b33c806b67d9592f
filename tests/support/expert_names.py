"""Names of experts' tensors: one by one in files, stacked in transformers' memory."""


def in_files(tensors: dict) -> dict:
    """Renames tensors in memory to those of the files, which have the experts one by one."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("mlp.experts"):
            found[name] = tensor
        elif kind == "gate_up_proj":
            for expert, both in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    found[f"{stem}.{expert}.{part}.weight"] = half
        else:
            for expert, down in enumerate(tensor):
                found[f"{stem}.{expert}.{kind}.weight"] = down
    return found
