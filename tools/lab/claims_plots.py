"""The picture of the claims: what was measured as bars, what was claimed beside them."""

from collections.abc import Mapping
from math import isinf
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tools.lab.claims_verdict import CLAIMS, Result, Verdict, verdict

COLOURS = {
    Verdict.BEATEN: "#1b7f5c",
    Verdict.REPRODUCED: "#1b6ca8",
    Verdict.NOT: "#c1440e",
}
CLAIMED = "#d9d2c0"


def draw_claims(results: Mapping[str, Result], path: Path) -> None:
    """A line for each claim: the claimed range as a band, the median as a bar, rounds as dots."""
    height = 0.62 * len(CLAIMS) + 1.5
    figure, axis = plt.subplots(figsize=(9.2, height), layout="constrained")
    ratios = [each for result in results.values() for each in result.ratios]
    ends = [claim.high for claim in CLAIMS if not isinf(claim.high)]
    left, right = min([0.8, *(0.85 * each for each in ratios)]), 1.35 * max([*ends, *ratios])
    margin = axis.get_yaxis_transform()
    for y, claim in enumerate(CLAIMS):
        high = right if isinf(claim.high) else claim.high
        axis.barh(y + 0.24, high - claim.low, left=claim.low, height=0.34, color=CLAIMED)
        result = results.get(claim.key)
        if result is None:
            axis.text(1.01, y - 0.16, "not measured", transform=margin, va="center", fontsize=8.5)
            continue
        found = verdict(claim, result)
        axis.barh(y - 0.16, result.ratio - 1, left=1, height=0.42, color=COLOURS[found])
        axis.plot(result.ratios, [y - 0.16] * len(result.ratios), "o", color="#202020", ms=2.6)
        said = f"{result.ratio:.2f} times: {found}"
        axis.text(1.01, y - 0.16, said, transform=margin, va="center", fontsize=8.5)
    axis.axvline(1, color="#404040", lw=0.9)
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=14))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_yticks(range(len(CLAIMS)), [claim.title for claim in CLAIMS])
    axis.invert_yaxis()
    axis.set_xlabel("times better than without (log scale); 1 is no difference")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=CLAIMED, label="claimed")]
    handles += [Patch(color=colour, label=f"measured: {name}") for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)
