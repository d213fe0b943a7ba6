"""The look of the pages' figures, which each page runs first: vector graphics for light and dark pages."""

import matplotlib as mpl
from cycler import cycler
from matplotlib_inline.backend_inline import set_matplotlib_formats

BLUE, ORANGE, GREEN, RED, PURPLE = "#3f8fd2", "#e2822e", "#2fa37c", "#d9534f", "#9a77cf"
INK, FAINT = "#7d8590", "#8b949e55"  # readable on white and on black

set_matplotlib_formats("svg")
mpl.rcParams |= {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.figsize": (7.6, 3.2),
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "image.cmap": "viridis",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "none",
    "svg.hashsalt": "minrnn",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
