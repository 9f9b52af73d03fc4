"""The documentation site. Build it with: sphinx-build -W -b html docs build/docs"""

import inspect
import os
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.util.inspect import stringify_signature

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process and of the notebooks
sys.path.insert(0, str(Path(__file__).parent))

import generate

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESSES = PROJECT.get("urls", {}).values()
REPOSITORY = next((url for url in ADDRESSES if re.fullmatch(r"https://github.com/[^/]+/[^/]+", url)), None)
"""Where the source lies on the web; None leaves the links to it out."""
TESTS = generate.tests_by_name()

project, author = "resnet_jax", "the authors of resnet_jax"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["generated", "lab", "_build"]
nitpicky = True
nitpick_ignore_regex = [  # what other libraries document, and types of ours that results have
    (r"py:.*", r"(?!resnet_jax\.).*|resnet_jax\.(config|weights\.tags|training|models|analysis)\.[\w.]+"),
]
default_role = "code"  # single backticks in docstrings
smartquotes = False  # a flag such as --json, and quotes to copy, stay as they are

html_theme = "sphinx_book_theme"
html_title = "resnet_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_fullscreen_button": False,
    "use_download_button": False,
    "navbar_persistent": [],  # no second search above the page
}
if REPOSITORY:
    html_theme_options |= {"repository_url": REPOSITORY, "use_repository_button": True, "path_to_docs": "docs"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as the source has them, such as nn.relu
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a class as one list, their types in its signature alone
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"


def link_file(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Links a file of the repository: {repo}`path`."""
    literal = nodes.literal(text, text)
    if not (ROOT / text).exists():
        return unknown("file", rawtext, lineno, inliner)
    if REPOSITORY is None:
        return [literal], []
    return [nodes.reference("", "", literal, refuri=f"{REPOSITORY}/blob/main/{text}")], []


def link_test(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Links a test by its name to its source on the page of proofs: {test}`test_name`."""
    if text not in TESTS:
        return unknown("test", rawtext, lineno, inliner)
    about = {"refdomain": "std", "reftype": "ref", "refexplicit": True, "reftarget": text, "refwarn": True}
    return [pending_xref(rawtext, nodes.literal(text, text), refdoc=inliner.document.settings.env.docname, **about)], []


def unknown(kind, rawtext, lineno, inliner):
    """Warns that there is no such file or test."""
    message = inliner.reporter.warning(f"there is no such {kind}: {rawtext}", line=lineno)
    return [inliner.problematic(rawtext, rawtext, message)], [message]


def add_notebook_links(app, docname, source):
    """Puts links to Colab and to the notebook's file below the title of each page that is executed."""
    if not source[0].startswith("---\nfile_format: mystnb"):
        return
    file = f"notebooks/{docname}.ipynb"
    colab, words = "https://colab.research.google.com/", "Open Colab, to upload it there"
    if REPOSITORY:
        owner = REPOSITORY.removeprefix("https://github.com/")
        colab, words = f"{colab}github/{owner}/blob/gh-pages/{file}", "Open in Colab"
    links = f'<a href="{file}" download>Download as .ipynb</a> <a href="{colab}">{words}</a>'
    below = f'\n<p class="notebook">{links}</p>\n'
    source[0] = re.sub(r"^# .+\n", lambda title: title[0] + below, source[0], count=1, flags=re.M)


def write_notebooks(app, exception):
    """Writes each page that is executed as a notebook for Jupyter and Colab, beside the site."""
    if exception is None and app.builder.name == "html":
        generate.write_notebooks(Path(app.outdir) / "notebooks", REPOSITORY)


class Word(str):
    """A default that is written by its name alone, such as BatchNorm for a class."""

    __repr__ = str.__str__


def name_defaults(app, what, name, thing, options, signature, returned):
    """Returns the signature of a class, its default functions and classes by their names, without Flax's own fields."""
    if what != "class" or not hasattr(thing, "__dataclass_fields__"):
        return None
    found = inspect.signature(thing)
    own = [one for key, one in found.parameters.items() if key not in {"parent", "name"} & set(vars(thing))]
    named = [one.replace(default=Word(getattr(one.default, "__name__", repr(one.default)))) for one in own]
    kept = [new if old.default is not old.empty else old for old, new in zip(own, named, strict=True)]
    shown = found.replace(parameters=kept, return_annotation=found.empty)
    return stringify_signature(shown, unqualified_typehints=True), None


def tidy_fields(app, tree):
    """Puts a dash between a parameter and what it is, which Sphinx leaves to `smartquotes`; names a class's fields."""
    for name in tree.findall(nodes.field_name):
        if name.astext() == "Variables":
            name[0] = nodes.Text("Fields")
    for text in [found for found in tree.findall(nodes.Text) if found == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))


def setup(app):
    """Generates pages, and adds the roles and the notebooks."""
    generate.write_pages(REPOSITORY)
    app.add_role("repo", link_file)
    app.add_role("test", link_test)
    app.connect("source-read", add_notebook_links)
    app.connect("autodoc-process-signature", name_defaults)
    app.connect("doctree-read", tidy_fields)
    app.connect("build-finished", write_notebooks)
