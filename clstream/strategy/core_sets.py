"""Core sets: few samples that stand for many, chosen by where their features lie; and a memory that holds them.

    random      uniform, without repeats
    k_center    the one nearest to the mean, then each time the one farthest from those chosen (greedy)
    k_means     Lloyd's k-means from random samples, then for each centre the nearest that is not chosen yet
    herding     each time the one that brings the mean of those chosen nearest to the mean of all
    evt         a Weibull distribution is fitted to the cosine distances from the mean (`clstream.strategy.extreme_values`, all of
                them as the tail); those chosen lie nearest to its quantiles, the middles of equal shares from 0 to omega, and what
                is an outlier with a probability above omega is left out

The survey "A Wholistic View of Continual Learning" (Mundt et al. 2023) compares such sets; how its last one is made is in no public
code, and this form is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clstream.memory import Memory
from clstream.params import check_choice, check_integer
from clstream.strategy.extreme_values import cosine_distances, fit_weibull
from clstream.stream import Samples

CORE_SETS = ("random", "k_center", "k_means", "herding", "evt")
ROUNDS = 20
"""Of k-means, at most."""


def choose(
    method: str, features: Tensor, many: int, random: torch.Generator, trusted: Tensor | None = None, omega: float = 0.95
) -> Tensor:
    """Return the rows of a core set, in the order in which they were chosen: int64, on the CPU.

    Args:
        method: one of `CORE_SETS`.
        features: (n, d).
        many: how many are chosen, at most n; all if there are no more.
        random: draws what is random, on the CPU.
        trusted: (n,) bool, for "evt": those that mean and distribution are taken of. None: all.
        omega: for "evt": the greatest outlier probability.

    Raises:
        ValueError: for another method, and for "evt" where the trusted distances are too few, or all equal.

    """
    check_choice(CORE_SETS, method=method)
    check_integer(0, many=many)
    many = min(many, len(features))
    if method == "random" or not many:
        return torch.randperm(len(features), generator=random)[:many]
    if method == "evt":
        return _by_quantiles(features, many, trusted, omega)
    if method == "k_means":
        return _nearest_unused(torch.cdist(k_means(features, many, random), features))
    if method == "herding":
        return herding(features, many)
    start = (features - features.mean(0)).square().sum(1).argmin()
    return torch.cat([start[None].cpu(), k_center(features, many - 1, features[start][None])])


def k_center(features: Tensor, many: int, covered: Tensor) -> Tensor:
    """Return rows of (n, d), each the farthest from (k, d) features that are covered and from the rows before it (greedy)."""
    nearest = torch.cdist(features, covered).amin(1)
    rows = list[Tensor]()
    for _ in range(many):
        row = nearest.argmax()
        rows.append(row)
        nearest = torch.minimum(nearest, (features - features[row]).norm(dim=1)).index_fill(0, row, -1.0)
    return torch.stack(rows).cpu() if rows else torch.zeros(0, dtype=torch.int64)


def herding(features: Tensor, many: int) -> Tensor:
    """Return at most `many` rows of (n, d), each the one that brings the mean of those so far nearest to the mean of all.

    None comes twice; of several that do it alike it is the first one. Int64, on the CPU.
    """
    apart = features - features.mean(0)  # the mean of some rows of these is 0 where theirs is the mean of all
    lengths, total = apart.square().sum(1), torch.zeros_like(apart[0])
    rows = list[Tensor]()
    for _ in range(min(many, len(features))):
        row = (lengths + 2 * (apart @ total)).argmin()  # |total + one more|^2, but for |total|^2
        rows.append(row)
        total, lengths = total + apart[row], lengths.index_fill(0, row, torch.inf)
    return torch.stack(rows).cpu()


def k_means(features: Tensor, many: int, random: torch.Generator) -> Tensor:
    """Return (many, d), the centres of Lloyd's k-means of (n, d) features from `many` of them at random; at most n."""
    centres = features[torch.randperm(len(features), generator=random)[:many].to(features.device)]
    owner = torch.full((len(features),), -1, device=features.device)
    for _ in range(ROUNDS):
        new = torch.cdist(features, centres).argmin(1)
        if torch.equal(new, owner):
            break
        owner = new
        sums = torch.zeros_like(centres).index_add_(0, owner, features)
        counts = owner.bincount(minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _by_quantiles(features: Tensor, many: int, trusted: Tensor | None, omega: float) -> Tensor:
    mean = (features if trusted is None else features[trusted]).mean(0)
    distances = cosine_distances(features, mean)
    weibull = fit_weibull(distances if trusted is None else distances[trusted])
    rows = (weibull.outlier_probability(distances) <= omega).nonzero().flatten()
    many = min(many, len(rows))
    shares = (torch.arange(many, device=features.device) + 0.5) / max(1, many) * omega
    return rows.cpu()[_nearest_unused((weibull.quantile(shares)[:, None] - distances[rows]).abs())]


def _nearest_unused(distances: Tensor) -> Tensor:
    """Return for each row of (many, n) distances the column that is nearest of those that no row before it has."""
    taken = torch.zeros_like(distances[0], dtype=torch.bool) if len(distances) else torch.zeros(0, dtype=torch.bool)
    columns = list[Tensor]()
    for own in distances:
        column = own.masked_fill(taken, torch.inf).argmin()
        columns.append(column)
        taken = taken.index_fill(0, column, True)
    return torch.stack(columns).cpu() if columns else torch.zeros(0, dtype=torch.int64)


class CoreSet(Memory):
    """A memory that holds what it is told to: `hold` replaces its content, and what is offered by `add` is only counted.

    Args:
        capacity: the most samples that are kept, at least 1.

    """

    def add(self, samples: Samples) -> None:
        """Count a batch. Raises TypeError for samples with fields that a stream's have not: nothing could be held with them."""
        if set(samples.extra) - {"task"}:
            raise TypeError(
                f"a core set holds samples as a session has them, without {', '.join(sorted(samples.extra))}: wrap a strategy that "
                "replays inputs and labels alone, as Replay"
            )
        self.seen += len(samples)

    def hold(self, samples: Samples) -> None:
        """Keep these samples, and no others. Raises ValueError for more than the capacity."""
        if len(samples) > self.capacity:
            raise ValueError(f"a core set of at most {self.capacity} samples can't hold {len(samples)}")
        self._prepare(samples)
        places = torch.arange(len(samples)).numpy()
        self._write(samples, places, places)
        self.size = len(samples)
