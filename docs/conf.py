"""Sphinx: `sphinx-build -W -b html docs out/docs` (pip install -r docs/requirements.txt)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout, nothing is installed

project = "maskclip_jax"
author = "maskclip_jax's contributors"
html_title, html_theme = "maskclip_jax", "furo"
html_static_path = []
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["requirements.txt"]
nb_execution_mode = "off"  # outputs are committed; tests/docs/test_notebooks.py runs the cells
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_default_options = {"members": False, "member-order": "bysource"}
autodoc_typehints = "signature"
napoleon_custom_sections = [("Fields", "params_style")]
