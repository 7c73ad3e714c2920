"""A study drawn: a dot for each seed and a bar for their mean, by variant."""

from collections.abc import Sequence

from dist_pca.data.addresses import redact
from dist_pca.tools.study.design import Study
from dist_pca.tools.study.results import RunResult, Summary

# Okabe and Ito's palette, which colour-blind readers can distinguish too.
_BASELINE, _OTHER = "#7F7F7F", "#0072B2"


def draw(study: Study, results: Sequence[RunResult], summaries: Sequence[Summary]) -> bool:
    """Write study.png into the study's folder; False where matplotlib is missing and there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [shards for shards in study.tests if any(summary.shards == shards for summary in summaries)]
    rows = len(study.variants)
    figure = Figure(figsize=(7, max(1, len(shown)) * (1.2 + 0.4 * rows)), layout="constrained")
    for place, shards in enumerate(shown, 1):
        axes = figure.add_subplot(len(shown), 1, place)
        for summary in (each for each in summaries if each.shards == shards):
            row = next(row for row, variant in enumerate(study.variants) if variant.name == summary.variant)
            is_baseline = summary.variant == study.baseline
            colour = _BASELINE if is_baseline else _OTHER
            dots = [
                100 * r.scores[shards].mean_iou for r in results if r.variant == summary.variant and shards in r.scores
            ]
            mean = 100 * summary.mean_iou
            axes.plot(dots, [row] * len(dots), "o", color=colour, alpha=0.6, markersize=6, markeredgewidth=0)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2.5)
            if is_baseline:
                axes.axvline(mean, color=colour, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_yticks(range(rows), [variant.name for variant in study.variants])
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xlabel("mIoU, per cent: each seed, and the mean")
        axes.set_title(redact(shards), fontsize=10, loc="left")
        axes.grid(visible=True, axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    study.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(study.out / "study.png", dpi=160)
    return True
