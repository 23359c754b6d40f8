"""The page docs/zoo.md: what each strategy is, needs, keeps and costs, and what was measured of it, from the code itself.

`python experiments/zoo_page.py` runs each strategy that experiments/results/zoo.json lacks for a few seconds, adds there what it
cost, and writes the page from that, from the docstrings and from the records of the headline; `python experiments/zoo_page.py EWC`
runs EWC again.

The runs are of `split_digits`, one epoch in batches of 10, with an Mlp of 64 units or, where a method asks for a vision
transformer, with a small one; options are the defaults, but where these are for much larger images. FLOPs are those of learning,
as a multiple of what fine-tuning of the same network takes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from inspect import getdoc, signature
from pathlib import Path
from statistics import mean

import clstream.strategies as zoo
from clstream.streams import split_digits
from torch import nn

from clstream import Strategy, Stream, run
from clstream.adapters import LoRA, adapt
from clstream.comparison import read_records
from clstream.models import Mlp, VitTiny
from clstream.seeds import isolated
from clstream.strategy import needs

ROOT = Path(__file__).resolve().parent.parent
COSTS = Path("experiments", "results", "zoo.json")
PAGE = Path("docs", "zoo.md")

VITS = ("CODAPrompt", "CPEVision", "CoACT", "DualPrompt", "L2P", "MultiLane")
"""Those that run on a vision transformer here."""

BUILT: dict[str, Callable[[nn.Module], Strategy]] = {
    "CODAPrompt": lambda model: zoo.CODAPrompt(model, blocks=(0, 1)),
    "CoACT": lambda model: zoo.CoACT(adapt(model, LoRA(4, modules="*.qkv"), trained=[])),
    "DualPrompt": lambda model: zoo.DualPrompt(model, g_blocks=(0,), e_blocks=(1,)),
    "GDumb": lambda model: zoo.GDumb(model, epochs=16),
    "Hypernetwork": lambda model: zoo.Hypernetwork(model, chunk=500, task_size=8, chunk_size=8),
    "MultiLane": lambda model: zoo.MultiLane(model, prompted_blocks=2),
    "OpenVAE": lambda model: zoo.OpenVAE(model, latent=20, decoder=(32,), proposals=8192),
    "Regularised": lambda model: zoo.Regularised(zoo.Replay(model), [zoo.L2Penalty()]),
    "RanPAC": lambda model: zoo.RanPAC(model, projection=1000),
}
"""Where the defaults are for larger networks or images."""

STRATEGIES = [name for name in zoo.__all__ if issubclass(getattr(zoo, name), Strategy)]

APART = ("AvalancheStrategy", "CPECLIP")
"""Those that are run by another package, or need a network that was trained with texts: no costs."""


def network(name: str, stream: Stream) -> nn.Module:
    """Return the network that a strategy is run with."""
    with isolated(0, "strategy"):
        if name in VITS:
            return VitTiny((1, 8, 8), stream.classes, patch=4, width=32, depth=2, heads=2, fused=True)
        return Mlp(stream.input_shape, stream.classes, hidden=(64,))


def build(name: str, model: nn.Module) -> Strategy:
    """Return a strategy around a network; a wrapper is around `Replay`."""
    cls: type[Strategy] = getattr(zoo, name)
    with isolated(0, "strategy"):
        if name not in BUILT and "base" in signature(cls).parameters:
            return cls(zoo.Replay(model))  # type: ignore[arg-type]
        return BUILT.get(name, cls)(model)


def cost(name: str) -> dict[str, float]:
    """Return the bytes that a strategy keeps in the end, and its FLOPs of learning as a multiple of fine-tuning's."""
    stream = split_digits(epochs=1, batch_size=10)
    result, base = (run(build(method, network(name, stream)), stream) for method in (name, "Finetune"))
    spent, plain = (float(own.cost.learning_flops.sum() + own.cost.consolidating_flops.sum()) for own in (result, base))
    return {"bytes": float(result.cost.memory_bytes[-1]), "flops": round(spent / plain, 2)}


def paragraphs(name: str) -> list[str]:
    """Return the paragraphs of the docstring of a strategy's module, each on a line of its own."""
    text = sys.modules[getattr(zoo, name).__module__].__doc__ or ""
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]


def paper(name: str) -> str:
    """Return the paper that a docstring names: authors, year and title, or "" if it names none."""
    for text in paragraphs(name)[1:]:
        if found := re.match(r'(?:The protocol of )?((?:[^".:;]|et al\.)*?\b(?:19|20)\d\d, "[^"]+")', text):
            return found.group(1)
    return ""


def short(paper: str) -> str:
    """Return "Authors year" of a paper, with "et al." after the first of more than two authors."""
    authors, year = re.fullmatch(r'(.*?),? ((?:19|20)\d\d), ".*', paper).groups()  # type: ignore[union-attr]
    several = re.split(r", | & ", authors)
    return f"{several[0].removesuffix(' et al.')} et al. {year}" if len(several) > 2 or "et al" in authors else f"{authors} {year}"


def headline(name: str, root: Path) -> str:
    """Return the accuracy of a strategy on class-incremental Split MNIST, from the records of the headline in a tree, or ""."""
    runs = [
        record.metrics["average_accuracy"]
        for record in read_records(root / "experiments" / "results" / "headline.jsonl")
        if (record.strategy, record.stream, record.scenario) == (name, "split_mnist", "class") and not record.error
    ]
    return f"{mean(runs):.3f}" if runs else ""


def size(number: float) -> str:
    """Return bytes as 0, 5.2 kB or 1.3 MB."""
    return "0" if not number else f"{number / 1e3:.1f} kB" if number < 1e6 else f"{number / 1e6:.1f} MB"


def page(root: Path) -> str:
    """Return the page, from the costs and records in a tree of the source."""
    costs = json.loads((root / COSTS).read_text(encoding="utf-8"))
    lines = [
        "# Zoo",
        "",
        *fold(
            "All strategies, from the code: `python experiments/zoo_page.py` writes this page. *Kept* is what a strategy holds "
            "besides the network when the run is over, *FLOPs* is the learning of a run as a multiple of fine-tuning, both on "
            "`split_digits` with a small network; *Split MNIST* is the average accuracy in the table of [Results](results.md)."
        ),
        "",
        "| strategy | paper | targets | needs | kept | FLOPs | Split MNIST |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for name in STRATEGIES:
        cls = getattr(zoo, name)
        own = costs.get(name)
        wraps = cls.learns_targets == () or "base" in signature(cls).parameters
        cells = (
            f"[`{name}`](#{name.lower()})",
            short(source) if (source := paper(name)) else "",
            "as the wrapped one" if wraps else ", ".join(cls.learns_targets),
            ", ".join(needs(cls)),
            size(own["bytes"]) if own else "",
            f"{own['flops']:.2f}" if own else "",
            headline(name, root),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name in STRATEGIES:
        cls = getattr(zoo, name)
        file = Path(cls.__module__.removeprefix("clstream.").replace(".", "/") + ".py")
        told = [text for text in paragraphs(name) if text.startswith("Measured")]
        parts = [(getdoc(cls) or "").split("\n\n")[0], paper(name) and f"{paper(name)}.", *told, f"Code: [{file}](../{file})"]
        lines += ["", f"## {name}"]
        for text in filter(None, parts):
            lines += ["", *fold(text)]
    return "\n".join(lines) + "\n"


def fold(text: str) -> list[str]:
    """Return a text in lines of up to 120 characters, with its links to pages of the docs as links."""
    text = re.sub(r"`docs/([\w-]+)\.md`", r"[\1](\1.md)", text)
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > 120:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    measured = json.loads((ROOT / COSTS).read_text(encoding="utf-8")) if (ROOT / COSTS).exists() else {}
    for name in STRATEGIES:
        if name in sys.argv or name not in (*measured, *APART):
            measured[name] = cost(name)
            (ROOT / COSTS).write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(name, measured[name], flush=True)
    (ROOT / PAGE).write_text(page(ROOT), encoding="utf-8")
