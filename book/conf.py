"""Sphinx settings of the book: pages from the stored outputs, nothing is executed and nothing is fetched."""

from pathlib import Path

import jupyter_server_mathjax

project = "Why do language models generate harmful content?"
author = "the companion's authors"
html_title = "A reproducible companion"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "sphinx_book_theme"
html_theme_options = {"use_download_button": False, "show_toc_level": 2}
html_copy_source = False
html_static_path = [str(Path(jupyter_server_mathjax.__file__).parent / "static"), "_static"]
html_css_files = ["book.css"]
# The formulas are drawn by the MathJax that is copied into the book, not by one of the web.
myst_update_mathjax = False
mathjax_path = "MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"
mathjax2_config: dict[str, object] = {
    "messageStyle": "none",
    "HTML-CSS": {
        "availableFonts": [],
        "imageFont": None,
        "preferredFont": None,
        "webFont": "STIX-Web",
        "linebreaks": {"automatic": True},
    },
}
mathjax_options: dict[str, str] = {}
nitpicky = True
suppress_warnings = ["mystnb.unknown_mime_type"]
