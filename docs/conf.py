"""Configuration of the documentation's site, which `make docs` builds with Sphinx: warnings are errors."""

import os
import sys
import tempfile
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "sphinx"))

project = "minrnn"
author = "The minrnn authors"
copyright = "The minrnn authors, Apache-2.0"
release = version = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "inventories",
    "repository_links",
]
exclude_patterns = ["sphinx", "images"]

# --- pages ----------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Every code cell runs, and an error in one fails the build. Cells run beside their page, with one thread, and
# keep what they make in a folder of their own.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 600  # of a cell, on a machine that does other work too
nb_merge_streams = True
os.environ.setdefault("MINRNN_CACHE", tempfile.mkdtemp(prefix="minrnn-docs-"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# --- docstrings -----------------------------------------------------------------------------------------

default_role = "py:obj"  # what is in backticks: a link if it names something documented, else code
add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# --- appearance -----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"minrnn {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#2a6f97", "color-brand-content": "#2a6f97"},
    "dark_css_variables": {"color-brand-primary": "#7cc0e8", "color-brand-content": "#7cc0e8"},
}
highlight_language = "none"  # of equations in docstrings
pygments_style = "friendly"
pygments_dark_style = "github-dark"
