"""One legend for tables and pictures: the names of what is compared, their colours, and what they stand for."""

from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """How something is drawn, and what it is."""

    colour: str
    meaning: str


LEGEND = {
    "full": Name("#34495e", "full attention, by this library's engine: every head reads all keys and values"),
    "hybrid": Name("#c0392b", "this library's default: all heads attend to the selections of a few"),
    "hybrid+refresh2": Name("#e67e22", "hybrid that selects every second token"),
    "hybrid+float8": Name("#f1948a", "hybrid that scans an 8-bit copy of the retrieval heads' keys"),
    "hybrid+int4": Name("#d98880", "hybrid that scans a 4-bit copy of the retrieval heads' keys"),
    "hybrid+centroid": Name("#922b21", "hybrid with completion: unread tokens enter as the means of their chunks"),
    "hybrid+weights8": Name("#b9770e", "hybrid with the linear layers' weights in 8 bits, an error of its own"),
    "lossless": Name("#f1c40f", "hybrid drafts, verified by full attention: full attention's own text"),
    "vLLM": Name("#7f8c8d", "vLLM with its own attention"),
    "vLLM, hybrid": Name("#af7ac5", "vLLM with this library's plugin"),
    "transformers": Name("#bdc3c7", "Hugging Face's generate, eager, with SDPA"),
    "paper": Name("#2980b9", "the paper's form: retrieval heads read everything, donors by equal index"),
    "same-index": Name("#5dade2", "our roles, donors by equal index"),
    "random": Name("#95a5a6", "as many retrieval heads, drawn at random, donors by equal index"),
    "own-topk": Name("#000000", "every head its own exact top-k: an oracle that reads all keys"),
    "kascade": Name("#27ae60", "Kascade: the heads of some layers select for the layers that follow"),
    "tidaldecode": Name("#8e44ad", "TidalDecode: two layers select single tokens for those that follow"),
    "quest": Name("#d68910", "Quest: every head selects blocks by bounds on their keys"),
    "duo": Name("#16a085", "DuoAttention: retrieval heads read everything, all others the first and last tokens"),
    "streaming": Name("#6e2c00", "StreamingLLM: the first and last tokens alone"),
}
"""Name -> colour and meaning, in the order in which tables and pictures show them."""
OURS = {"hybrid": "", "hybrid+float8": "8-bit scan keys", "hybrid+int4": "4-bit scan keys"}
"""This library's forms that are compared with peers: name -> what a table says of it beside its budget."""
PEERS = ("paper", "kascade", "tidaldecode", "quest", "duo", "streaming", "same-index", "random")
"""What they must beat at equal bytes; the oracle `own-topk` reads all keys with every head."""


def name_of(label: str) -> str:
    """The legend's name for a policy with its budget or seed: `random:0, 512 tokens` is `random`."""
    if label in LEGEND:
        return label
    policy = label.split(",")[0].split("@")[0].split(":")[0]
    return policy if policy in LEGEND else policy.partition("+")[0]


def colour_of(label: str) -> str:
    """Its colour; grey for what the legend does not know."""
    found = LEGEND.get(name_of(label))
    return found.colour if found else "#7f8c8d"


def order_of(label: str) -> int:
    """Its place in the legend."""
    names = list(LEGEND)
    return names.index(name_of(label)) if name_of(label) in LEGEND else len(names)
