"""Runs scripts of examples/ in the tests' process."""

import contextlib
import functools
import importlib.util
import io
import pathlib

import matplotlib.figure
import pytest
from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples"


@contextlib.contextmanager
def own_flags():
    """Flags that are not those of other scripts: all name theirs alike."""
    own = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", own)
        for kind in ("bool", "enum", "float", "integer", "list", "string"):
            define = getattr(flags, f"DEFINE_{kind}")
            define = functools.partial(define, flag_values=own)
            patch.setattr(flags, f"DEFINE_{kind}", define)
        yield own


@functools.cache
def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with own_flags() as own:
        spec.loader.exec_module(module)
    own(["example"])
    return module


def run(name, *arguments):
    """What the example prints. Its flags are as before afterwards."""
    module = load(name)
    saved = flagsaver.save_flag_values(module.FLAGS)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module.FLAGS([name, *arguments])
            module.main([name])
    finally:
        flagsaver.restore_flag_values(saved, module.FLAGS)
    return printed.getvalue()


@contextlib.contextmanager
def kept_figures():
    """What is saved as a plot, by the file's name; nothing is drawn."""
    figures = {}

    def keep(figure, path, **_):
        figures[pathlib.Path(path).name] = figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", keep)
        yield figures
