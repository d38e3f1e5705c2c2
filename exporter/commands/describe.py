"""Describes a recipe and a model's config in plain text. Both are JSON, as in a manifest; a key
that an earlier version did not write is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
Rows = list[tuple[str, str]]


def describe_weights(recipe: Json, *, tied: bool = False) -> str:
    """Return how the matrices are stored.

    `tied`: embedding and head are one matrix.

    >>> int8, int4 = {"bits": 8, "block_size": 32}, {"bits": 4, "block_size": 32}
    >>> describe_weights({"embedding": int8, "head": int4, "linear": int4})
    'embedding int8, head int4, other matrices int4 in blocks of 32'
    >>> describe_weights({key: {"name": "fp16"} for key in ("embedding", "head", "linear")})
    'all matrices fp16'
    """
    embedding, head = recipe["embedding"], recipe["head"]
    others = _others(recipe)
    names = [_name(embedding), _name(head), *map(_name, others)]
    sizes = {way["block_size"] for way in (embedding, head, *others) if "bits" in way}
    if len(set(names)) == 1 and len(sizes) < 2:
        return f"all matrices {_sized(others[0])}"
    # A single block size is named once, at the end, if the last matrices have blocks.
    show = _name if len(sizes) == 1 and "bits" in others[-1] else _sized
    both = [("embedding and head (one matrix)", embedding)] if tied else []
    apart = both or [("embedding", embedding), ("head", head)]
    first = ", ".join(f"{what} {show(way)}" for what, way in apart)
    rest = " and ".join(dict.fromkeys(map(_sized, others)))
    return f"{first}, other matrices {rest}"


def _others(recipe: Json) -> Sequence[Json]:
    """Return how the matrices between embedding and head are stored: as in the source, as far as
    its codes were copied."""
    copied = [way for way in recipe.get("taken_over", ()) if way.get("in_layers", way["tensors"])]
    return copied if copied and not recipe.get("quantized_here") else [*copied, recipe["linear"]]


def _name(way: Json) -> str:
    return f"int{way['bits']}" if "bits" in way else str(way["name"])


def _sized(way: Json) -> str:
    return f"{_name(way)} in blocks of {way['block_size']}" if "bits" in way else _name(way)


def describe_recipe(recipe: Json, *, tied: bool = False) -> Rows:
    """Return the rows of a table: how weights are stored, and what the graph computes."""
    return [
        ("weights", describe_weights(recipe, tied=tied)),
        ("quantizer", _quantizer(recipe)),
        ("arithmetic", _arithmetic(recipe)),
        ("graph", "; ".join(_graph(recipe))),
    ]


def _quantizer(recipe: Json) -> str:
    if not any("bits" in recipe[key] for key in ("embedding", "head", "linear")):
        return "none: no matrix is quantized"
    copied = sum(way["tensors"] for way in recipe.get("taken_over", ()))
    also = f"; {copied} matrices keep the source's codes" if copied else ""
    return f"{recipe.get('quantizer', 'rtn')}{also}"


def _arithmetic(recipe: Json) -> str:
    activations = recipe.get("activations", "fp32")
    standard = recipe.get("operators", {}).get("standard", False)
    quantized = any("bits" in recipe[key] for key in ("head", "linear"))
    if not quantized or standard or activations != "fp32":
        return f"{activations} activations"
    kind = {1: "fp32", 4: "int8"}.get(recipe.get("accuracy_level", 4), "other")
    return f"{activations} activations, quantized matrices multiplied in {kind}"


def _graph(recipe: Json) -> Iterator[str]:
    last = recipe.get("logits") == "last"
    yield "logits for the last position only" if last else "logits for every position"
    standard = recipe.get("operators", {}).get("standard", False)
    yield "standard ONNX operators only" if standard else "ONNX Runtime's own operators"
    if recipe.get("fuse_gate_up"):
        yield "gate and up projections in one matrix"
    if swappable := recipe.get("swappable"):
        yield f"adapters can change {', '.join(swappable)}"


def describe_config(config: Json) -> Rows:
    """Return the rows of a table: the architecture, with readable names.

    >>> describe_config({"vocab_size": 32000, "tie_word_embeddings": True, "eos_token_ids": [2]})
    [('vocabulary', '32,000 tokens, embedding and head tied'), ('special tokens', 'end 2')]
    """
    rows = (
        ("layers", _layers(config)),
        ("attention", _attention(config)),
        ("vocabulary", _vocabulary(config)),
        ("special tokens", _special_tokens(config)),
        ("context", _context(config)),
        ("rope", _rope(config)),
    )
    return [(name, text) for name, text in rows if text]


def _layers(config: Json) -> str:
    if "num_hidden_layers" not in config:
        return ""
    norm = f", RMSNorm epsilon {config['rms_norm_eps']:g}" if "rms_norm_eps" in config else ""
    return (
        f"{config['num_hidden_layers']} of width {config['hidden_size']:,}, "
        f"MLP width {config['intermediate_size']:,}{norm}"
    )


def _attention(config: Json) -> str:
    if "num_attention_heads" not in config:
        return ""
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    window = config.get("sliding_window")
    sliding = f", sliding window of {window:,} positions" if window else ""
    return f"{heads} heads of width {config['head_dim']}, {shared} for keys and values{sliding}"


def _vocabulary(config: Json) -> str:
    if "vocab_size" not in config:
        return ""
    tied = "tied" if config.get("tie_word_embeddings") else "separate"
    return f"{config['vocab_size']:,} tokens, embedding and head {tied}"


def _special_tokens(config: Json) -> str:
    ids = {
        "start": config.get("bos_token_id"),
        "end": ", ".join(map(str, config.get("eos_token_ids") or ())) or None,
        "padding": config.get("pad_token_id"),
    }
    return "; ".join(f"{name} {value}" for name, value in ids.items() if value is not None)


def _context(config: Json) -> str:
    if "max_position_embeddings" not in config:
        return ""
    return f"{config['max_position_embeddings']:,} positions"


def _rope(config: Json) -> str:
    if "rope_theta" not in config:
        return ""
    theta = f"theta {config['rope_theta']:,.10g}"
    scaling = config.get("rope_scaling")
    if not scaling:
        return f"{theta}, not scaled"
    start = scaling.get("original_max_position_embeddings")
    shown = ("rope_type", "factor", "original_max_position_embeddings")
    rest = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in scaling.items()
        if value is not None and name not in shown
    ]
    scaled = f"{scaling['rope_type']} scaling by {scaling['factor']:g}"
    origin = f" from {start:,} positions" if start else ""
    return "; ".join([f"{theta}, {scaled}{origin}", *([", ".join(rest)] if rest else [])])


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return how many tensors there are of each type.

    >>> describe_counts({"F32": 1, "BF16": 200})
    '200 BF16, 1 F32'
    """
    return ", ".join(f"{count} {name}" for name, count in Counter(counts).most_common())
