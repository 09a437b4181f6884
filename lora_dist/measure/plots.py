"""The kinds of PNG: curves, stacked bars, bars with a spread, heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dist.writing import open_new_file

if TYPE_CHECKING:  # every run could draw, and few do: it takes half a second to load
    from matplotlib.figure import Figure

_DPI = 130
_COLORS = ("#2a6fbb", "#d1603d", "#4f9d69", "#8a63a8", "#c9a227", "#6c757d")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points of one series; `dashed` for the lighter companion of another of the same colour."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int
    dashed: bool = False


def save_curves(path: Path, *, title: str, xlabel: str, ylabel: str, curves: Sequence[Curve]) -> Path:
    """Lines over a common axis; a series of few points gets markers."""
    figure, axes = _open_figure(title, ylabel)
    for curve in curves:
        axes.plot(
            curve.xs,
            curve.ys,
            label=curve.label,
            color=_COLORS[curve.color % len(_COLORS)],
            linestyle="--" if curve.dashed else "-",
            linewidth=1.4,
            marker="o" if len(curve.xs) <= 20 else None,
            markersize=4,
        )
    axes.set_xlabel(xlabel)
    axes.legend(frameon=False)
    return _save(figure, path)


def save_bars(path: Path, *, title: str, ylabel: str, stacks: Mapping[str, Mapping[str, float]]) -> Path:
    """One bar a key of `stacks`, made of its named parts; its total stands above it."""
    figure, axes = _open_figure(title, ylabel)
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    totals = [sum(stack.values()) for stack in stacks.values()]
    bottoms = [0.0] * len(stacks)
    for index, part in enumerate(parts):
        heights = [stack.get(part, 0.0) for stack in stacks.values()]
        axes.bar(list(stacks), heights, 0.5, bottom=bottoms, label=part, color=_COLORS[index % len(_COLORS)])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, total in enumerate(totals):
        axes.text(position, total, f"{total:.3g}", ha="center", va="bottom")
    axes.margins(y=0.12)
    axes.set_xlim(-0.75, len(stacks) - 0.25)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def save_spread_bars(
    path: Path, *, title: str, ylabel: str, bars: Mapping[str, Mapping[str, tuple[float, float, float]]]
) -> Path:
    """Groups of bars: `bars[group][series]` = (median, p25, p75), the quartiles as whiskers."""
    figure, axes = _open_figure(title, ylabel)
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    width = 0.7 / len(series)
    for index, name in enumerate(series):
        positions = [position + (index - (len(series) - 1) / 2) * width for position in range(len(bars))]
        triples = [group[name] for group in bars.values()]
        medians = [median for median, _, _ in triples]
        whiskers = [[median - p25 for median, p25, _ in triples], [p75 - median for median, _, p75 in triples]]
        axes.bar(positions, medians, width, yerr=whiskers, capsize=4, label=name, color=_COLORS[index % len(_COLORS)])
        for position, (median, _, p75) in zip(positions, triples, strict=True):
            axes.annotate(f"{median:,.0f}", (position, p75), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def save_heat_map(path: Path, *, title: str, xlabel: str, ylabel: str, values: Sequence[Sequence[float]]) -> Path:
    """Values in [0, 1], rows downwards; both axes count from one."""
    figure, axes = _open_figure(title, ylabel)
    axes.grid(visible=False)
    num_rows, num_columns = len(values), len(values[0])
    image = axes.imshow(
        values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", extent=(0.5, num_columns + 0.5, num_rows + 0.5, 0.5)
    )
    figure.colorbar(image)
    axes.set_xlabel(xlabel)
    return _save(figure, path)


def _open_figure(title: str, ylabel: str):  # type: ignore[no-untyped-def]  # matplotlib's axes are untyped
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    with open_new_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")
    return path
