"""Optuna's pictures of a search."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna.study import Study


def search_pictures(study: Study) -> dict[str, Figure]:
    """Return Optuna's pictures of a study that say something of it, by name.

    They are: the best value so far by trial, the values by each option, the anytime average of each trial, and the importance of
    the options, where enough trials ended to tell.
    """
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if not ended:
        return {}
    with _own_style():
        import matplotlib.pyplot as plt
        import optuna.visualization.matplotlib as drawn

        kinds = {"history": drawn.plot_optimization_history, "slices": drawn.plot_slice, "anytime": drawn.plot_intermediate_values}
        kinds |= {"importances": drawn.plot_param_importances} if len(ended) > 3 and len(ended[0].params) > 1 else {}
        figures: dict[str, Figure] = {}
        for name, plot in kinds.items():
            with suppress(ValueError, RuntimeError):  # all values are one, say
                axes = plot(study)
                figures[name] = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
                figures[name].tight_layout()
        for figure in figures.values():
            plt.close(figure)
    return figures


@contextmanager
def _own_style() -> Iterator[None]:
    """Leave the style of the caller's own pictures as it is, and draw without a screen, if nothing was drawn yet."""
    import matplotlib

    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("agg")
    with matplotlib.rc_context():
        yield
