"""CPE-CLIP: a bank of prompts for both towers of a frozen CLIP; a class is its name, and old classes slow the bank down.

D'Alessandro, Alonso, Calabrés, Galar 2023, "Multimodal Parameter-Efficient Few-Shot Class Incremental Learning" (arXiv 2303.04751).
Of the paper only the abstract could be read; the form is that of the authors' code (neuraptic/cpe-clip), here on open_clip.

G (depth D, prompts L, width of the text tower) is the bank, P a linear map to the width of the image tower, and both are learned:

    text      first token, G_0, the rest of the name; positions are added after that, to prompts too. Before block i < D the prompts
              are replaced by G_i. A causal mask over all. Final norm at the token that ends the name, projection, unit length
    image     class token, patches with their positions, P(G_0); then the norm before the first block. Before block i < D what came
              of the prompts stays, and P(G_i) is appended. Norm of the class token, projection, unit length
    an answer scale * cosine of the image and the name of each class that came, names encoded with the prompts as they are now
    a session a new optimizer (SGD, momentum 0.9, weight decay 1e-5); in epoch e of it the learning rate is 0.001 + 0.099 e / 50.
              Cross-entropy over the session's own classes. Gradients of G and P times N_t / (N_1 + ... + N_t), N_t classes of the
              session; weight decay and momentum are not scaled

Nothing is kept for a class but its name. Old and new classes never compete while prompts are learned: that is up to the space that
texts and images share, so without the weights of a CLIP that has seen such concepts new classes are guessed. A session of one class
has a loss of 0, and teaches nothing.

Deviations: the stream says epochs and the size of batches, one for all sessions (published: 32 in the first and 4 later). Names are
padded to the longest, and no mask hides the padding: by the causal mask it comes too late to be seen. Names of other sessions are
not encoded while one learns: the code masks them with -9999, which is the same loss and the same gradients. Classes that come again
count with their session. The learning rate is the optimizer's, which the schedule multiplies; the code sets it.

Measured: mechanism alone, on towers of our own, in `docs/cpe-clip.md`. No published number has been reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from clstream.strategies.cpe_clip.prompts import MODES, PromptBank, PromptTuning, braked, run_with_prompts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream.bus import on
from clstream.events import BatchLearned, RunStarted
from clstream.measures.flops import counted_once
from clstream.models import Clip
from clstream.params import check_choice
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples, Task


class CPECLIP(PromptTuning):
    """Learn prompts for both towers of a frozen CLIP; answer with the class whose name is nearest.

    Args:
        model: a `Clip`. It is frozen, and its head is not used.
        optimizer: makes the optimizer of a session from the prompts and the map.
        prompts: L, of each block.
        depth: D, how many blocks have prompts. None: all.
        text: how prompts go from block to block of the text tower: "replace", "accumulate" or "accumulate_same".
        vision: the same of the image tower.
        brake: whether gradients are multiplied by the share that the session's classes have of all that came.
        schedule: of the learning rate: "warm_up", which begins with a hundredth of it in each session, or "constant".
        scale: what cosines are multiplied by.
        text_of_class: what the text tower reads of a class, with {} for its name.
        class_names: of the labels from 0 up. None: those of the stream.

    """

    not_state = (*Strategy.not_state, "encoded")

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-5),
        prompts: int = 2,
        depth: int | None = None,
        text: str = "replace",
        vision: str = "accumulate",
        brake: bool = True,
        schedule: str = "warm_up",
        scale: float = 100.0,
        text_of_class: str = "{}.",
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_choice(MODES, text=text, vision=vision)
        if not isinstance(text_of_class, str) or "{}" not in text_of_class:
            raise ValueError(f"text_of_class must be a text with {{}} where the name goes, as '{{}}.', not {text_of_class!r}")
        super().__init__(model, optimizer, prompts, depth, brake, schedule, scale)
        self.text, self.vision = text, vision
        self.text_of_class, self.class_names = text_of_class, class_names
        clip = self.clip_model.clip
        widths = clip.transformer.width, clip.visual.transformer.width
        self.bank = PromptBank(self.depth, prompts, widths[0])
        self.map = nn.Linear(*widths)
        self.tokens = torch.empty(0, 0, dtype=torch.int64)  # (classes, longest name)
        self.steps = 0  # taken so far
        self.encoded: Tensor | None = None  # the names of the classes that came, with the prompts as they are now
        self.renew_optimizer()

    @property
    def clip_model(self) -> Clip:
        """The model."""
        assert isinstance(self.model, Clip)
        return self.model

    def count_blocks(self) -> int:
        """Return the number of blocks that both towers have."""
        if not isinstance(self.model, Clip):
            raise TypeError(f"CPECLIP needs a model with an image tower and a text tower, Clip, not {type(self.model).__name__}")
        return min(len(self.model.clip.transformer.resblocks), len(self.model.clip.visual.transformer.resblocks))

    def learned(self) -> Sequence[nn.Parameter]:
        """Return the bank and the map."""
        return [*self.bank.parameters(), *self.map.parameters()]

    @on(RunStarted)
    def read_names(self, event: RunStarted) -> None:
        """Turn the names of the classes into tokens. Raises ValueError if there are none, or they are too long."""
        stream, names = event.stream, self.class_names
        if names is None:
            names = stream.class_names
        if not names:
            raise ValueError(
                f"CPECLIP tells classes by their names, and {stream.name} has none: give the stream class_names, or CPECLIP "
                "class_names=[...]"
            )
        if len(names) < stream.classes:
            raise ValueError(f"{stream.name} has {stream.classes} classes, and class_names only {len(names)}: name each")
        clip = self.clip_model.clip
        tokens = self.clip_model.tokens([self.text_of_class.format(name) for name in names])
        longest = tokens.shape[1] + self.bank.weight.shape[1] * (1 if self.text == "replace" else self.depth)
        if longest > clip.context_length:
            raise ValueError(
                f"the longest name of {stream.name} has {tokens.shape[1]} tokens, {longest} with its prompts, and the text tower "
                f"reads {clip.context_length}: give it shorter ones, class_names=[...]"
            )
        self.tokens, self.encoded, self.steps = tokens.to(self.bank.weight.device), None, 0

    @on(BatchLearned)
    def forget_encoded(self, event: BatchLearned) -> None:
        """The names have to be encoded anew: the prompts have moved."""
        self.encoded = None
        self.steps += 1

    def encode_names(self, labels: Tensor) -> Tensor:
        """Return (n, d) unit rows, the names of (n,) labels."""
        clip, bank, tokens = self.clip_model.clip, braked(self.bank.weight, self.ratio), self.tokens[labels]
        x = clip.token_embedding(tokens)
        x = torch.cat([x[:, :1], bank[0].expand(len(x), -1, -1), x[:, 1:]], 1)
        x = x + clip.positional_embedding[: x.shape[1]]

        def block(layer: nn.Module, x: Tensor) -> Tensor:
            y: Tensor = layer(x, attn_mask=clip.attn_mask[: x.shape[1], : x.shape[1]])
            return y

        x = run_with_prompts([partial(block, layer) for layer in clip.transformer.resblocks], x, 1, bank, self.text)
        ends = tokens.argmax(1) + x.shape[1] - tokens.shape[1]
        x = clip.ln_final(x[torch.arange(len(x), device=x.device), ends])
        return F.normalize(x @ clip.text_projection, dim=1)

    def encode_images(self, x: Tensor) -> Tensor:
        """Return (n, d) unit rows of (n, *input_shape) raw images."""
        visual = self.clip_model.clip.visual
        weight, bias = braked(self.map.weight, self.ratio), braked(self.map.bias, self.ratio)
        prompts = F.linear(braked(self.bank.weight, self.ratio), weight, bias)
        x = visual.conv1(self.clip_model.stages.get_submodule("input")(x)).flatten(2).mT
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        begin = x.shape[1]
        x = visual.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1))
        x = run_with_prompts(visual.transformer.resblocks, x, begin, prompts, self.vision)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=1)

    def loss(self, samples: Samples) -> Tensor:
        """Return the cross-entropy over the names of the session's classes."""
        x = samples.x if self.augment is None else self.augment(samples.x)
        cosines = self.encode_images(x) @ self.encode_names(self.current).T
        return F.cross_entropy(self.scale * cosines, torch.searchsorted(self.current, samples.y))

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, classes): scaled cosines with the names of the classes that came, -inf for others."""
        seen = self.seen_classes
        if seen is None or not len(seen):
            return torch.full_like(self.clip_model(x), float("-inf"))
        if self.encoded is None or len(self.encoded) != len(seen):
            with counted_once(("names", self.steps, len(seen))):
                self.encoded = self.encode_names(seen)
        cosines = self.encode_images(x) @ self.encoded.T
        return cosines.new_full((len(x), len(self.tokens)), float("-inf")).index_copy(1, seen, self.scale * cosines)
