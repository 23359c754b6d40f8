"""DualPrompt: prompts that all tasks share in the first blocks, and in later ones prompts of each task, chosen by a key.

Wang, Zhang, Ebrahimi, Sun, Zhang, Lee, Ren, Su, Perot, Dy, Pfister 2022, "DualPrompt: Complementary Prompting for Rehearsal-free
Continual Learning". Form implemented, with a frozen vision transformer and q(x) its features of an image:

    G-prompts   in blocks `g_blocks`: g_length keys and as many values, put before those of each head; shared by all tasks
    E-prompts   in blocks `e_blocks`: e_length keys and values for each task t, and one key k_t for all of these blocks
    learning    task t with its own E-prompts:  loss = cross-entropy of head(features) - pull * mean cos(q(x), k_t)
    answer      with the E-prompts of the task whose key has the greatest cosine with q(x)

The query has no gradient, so keys learn by the second term alone. Read in the authors' code (google-research/l2p @3e102b0):
G-prompts of 5 in the blocks 0 and 1, E-prompts of 5 (CIFAR-100) or 20 (ImageNet-R) in 2, 3 and 4; all begin uniform (from 0 to
0.01: JAX's default, recalled); a new task's E-prompts begin as the last task's, its key afresh; logits outside of the task's
classes are -inf in the loss; pull 1; Adam without weight decay, anew for each task, at a rate of 0.03 (CIFAR-100, 5 epochs) or
0.005 (ImageNet-R, 50 epochs) times the batch size / 256.

E-prompts come when their task does, so nothing has to be known of how many there will be, and an answer is chosen among the keys of
tasks that came; that code makes those of 10 tasks at the start, and chooses among keys of tasks that never came, too. A task that
comes again goes on with its own.

Deviations: in that code a batch of CIFAR-100 images chooses together; here, as there for ImageNet-R, each by itself. Its head
begins with weights of 0, and gradients are clipped at a norm of 1; here the head is the model's, and nothing is clipped. The form
of CODA-Prompt's authors differs: a key for each block, a sum in place of the mean, half of a prompt's length for keys.

Measured: see `docs/prompts.md`; no published number was run: there are no ImageNet-21k weights here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clstream.bus import on
from clstream.events import RunStarted, TaskStarted
from clstream.models.vit_blocks import Vit
from clstream.params import check_integer, check_number
from clstream.strategy import OptimizerFactory
from clstream.strategy.prompting import Prompting


class DualPrompt(Prompting):
    """Learn G-prompts for all tasks, and E-prompts and a key for each.

    Args:
        model: a vision transformer: see `clstream.models.vit_blocks`. It is frozen, but for its head.
        optimizer: makes the optimizer, anew for each task.
        g_length, e_length: how many keys, and values, a G-prompt and an E-prompt have.
        g_blocks, e_blocks: numbers of the blocks that have them, from 0.
        pull: weight of the cosine of query and key.
        active_classes: whose outputs compete, "all", "seen" or "task", as published: see `clstream.Strategy`.

    Raises:
        TypeError: for a model that is no vision transformer.
        ValueError: for options out of range, blocks that the model hasn't, and where a run starts for images of another shape than
            the model takes.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.015),
        g_length: int = 5,
        e_length: int = 5,
        g_blocks: tuple[int, ...] = (0, 1),
        e_blocks: tuple[int, ...] = (2, 3, 4),
        pull: float = 1.0,
        active_classes: str = "task",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_integer(1, g_length=g_length, e_length=e_length)
        check_number(0, pull=pull)
        self.check_blocks(g_blocks=g_blocks, e_blocks=e_blocks)
        if both := {*g_blocks} & {*e_blocks}:
            raise ValueError(f"g_blocks and e_blocks both have {sorted(both)}: a block has G-prompts or E-prompts")
        self.g_blocks, self.e_blocks, self.pull = tuple(g_blocks), tuple(e_blocks), pull
        width = self.vit.width
        self.prompts = nn.ParameterDict(
            {
                "g": 0.01 * torch.rand(len(g_blocks), 2, g_length, width),  # block, keys or values, ...
                "e": 0.01 * torch.rand(len(e_blocks), 2, e_length, width),  # those of the task that goes on
                "key": 0.01 * torch.rand(width),
            }
        )
        self.optimizer = self.new_optimizer()
        self.random = torch.Generator()
        self.rows: dict[int, int] = {}  # of what is kept, by the task's number
        self.row = -1  # of the task that goes on
        self.kept_e = self.prompts["e"].detach()[None][:0]  # (tasks, blocks, 2, e_length, width)
        self.kept_keys = self.prompts["key"].detach()[None][:0]  # (tasks, width)

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Take the tasks of another run for others."""
        self.rows = {}

    @on(TaskStarted)
    @torch.no_grad()
    def begin_task(self, event: TaskStarted) -> None:
        """Keep the last task's E-prompts, go on with those of this one, and make a new optimizer."""
        self.kept_e, self.kept_keys = self.all_prompts()
        number = event.task.id
        e, key = self.prompts["e"], self.prompts["key"]
        if number in self.rows:
            self.row = self.rows[number]
            e.copy_(self.kept_e[self.row])
            key.copy_(self.kept_keys[self.row])
        else:
            self.row = self.rows[number] = len(self.kept_keys)
            if self.row:  # the first task has those of the constructor
                key.copy_(0.01 * torch.rand(key.shape, generator=self.random))
            self.kept_e, self.kept_keys = torch.cat([self.kept_e, e[None]]), torch.cat([self.kept_keys, key[None]])
        self.optimizer = self.new_optimizer()

    @torch.no_grad()
    def all_prompts(self) -> tuple[Tensor, Tensor]:
        """Return the E-prompts (tasks, blocks, 2, e_length, width) and keys (tasks, width) of all tasks, as they are now."""
        if self.row < 0:
            return self.kept_e, self.kept_keys
        e, keys = self.kept_e.clone(), self.kept_keys.clone()
        e[self.row], keys[self.row] = self.prompts["e"], self.prompts["key"]
        return e, keys

    def prompted(self, vit: Vit, tokens: Tensor, query: Tensor, learning: bool) -> tuple[Tensor, Tensor | float]:
        """Return features with the G-prompts and the E-prompts of the task, known or found, and what pulls its key to the query."""
        if learning or self.row < 0:
            e = self.prompts["e"]  # block, keys or values, ...: for all samples
        else:
            kept, keys = self.all_prompts()
            e = kept[(F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).argmax(1)].movedim(0, 2)  # ... for each sample
        prompts = dict(zip((*self.g_blocks, *self.e_blocks), (*self.prompts["g"].unbind(), *e.unbind()), strict=True))
        through = vit.run(tokens, {block: (keys, values) for block, (keys, values) in prompts.items()})
        return vit.features(through), -self.pull * F.cosine_similarity(query, self.prompts["key"][None]).mean()
