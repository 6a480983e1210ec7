"""How the package is cut: who imports whom, and how large the parts are.

The sources are read, not imported.
"""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "keras_vo"
# A room is a folder or a module of the package: what it may import of the
# package besides itself. `None`: everything, as it is above all rooms.
ROOMS = {
    "version": set(),
    "autograph": set(),
    "interrupts": set(),
    "keras_compat": set(),
    "tensorflow_compat": set(),
    "fitness_shaping": set(),
    "search": {"fitness_shaping"},
    "checks": {"search"},
    "constraints": {"search"},
    "precision": {"checks"},
    "perturbations": {
        "search",
        "keras_compat",
        "tensorflow_compat",
        "checks",
        "constraints",
    },
    "evaluation": {
        "search",
        "perturbations",
        "keras_compat",
        "tensorflow_compat",
        "checks",
        "interrupts",
    },
    "replicas": {"search", "keras_compat", "checks", "version"},
    "monitor": {"search", "replicas"},
    "inner_optimizer": {"keras_compat", "checks"},
    "search_distribution": {"search", "checks", "precision"},
    "layers": {"perturbations", "keras_compat", "checks"},
    "distribution": {"replicas"},
    "exchange": {"replicas"},
    "saved_search": {"search"},
    "layer_state": {"search", "keras_compat"},
    "pretrained": {"keras_compat"},
    "user_steps": set(),
    "population_metrics": {"search", "checks"},
    "member_weights": {"search", "perturbations", "checks"},
    "population": {"member_weights", "checks"},
    "told": {"search"},
    "technique_checks": {"checks", "inner_optimizer", "search"},
    "search_rules": {
        "constraints",
        "search",
        "search_distribution",
        "technique_checks",
    },
    "stopping": {"checks"},
    "remote_objective": set(),
    "optimizers": {"checks"},
    "rl": {
        "checks",
        "keras_compat",
        "interrupts",
        "optimizers",
        "population",
        "population_calls",
        "replicas",
        "told",
    },
    "population_calls": {
        "member_weights",
        "population",
        "evaluation",
        "keras_compat",
    },
    "outputs_of_batch": {
        "evaluation",
        "keras_compat",
        "layer_state",
        "perturbations",
    },
    "sensitivity": {"autograph", "evaluation", "outputs_of_batch", "search"},
    "search_variables": None,
    "search_files": None,
    "search_steps": None,
    "ask_tell": None,
    "minimize": None,
    "optimizer": None,
    "model_files": None,
    "step_functions": None,
    "losses_of_batch": {
        "checks",
        "evaluation",
        "perturbations",
        "keras_compat",
        "layer_state",
        "outputs_of_batch",
        "replicas",
        "search",
    },
    "training": None,
    "models": None,
    "callbacks": None,
    "__init__": None,
}
# Of Keras: no one but keras_compat has to do with these.
PRIVATE = {
    "_all_reduce_sum_gradients",
    "_clone_functional_model",
    "_clone_sequential_model",
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_distributed_dataset",
    "_flat_losses",
    "_flatten_layers",
    "_initial_epoch",
    "_keras_mask",
    "_loss_tracker",
    "_make_function",
    "_maybe_symbolic_build",
    "_unpickle_model",
    "_use_weight_decay",
}
TENSORFLOW_COMPAT = "keras_vo.tensorflow_compat"
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(name):
    return (name.split(".") + ["__init__"])[1]


@functools.cache
def tree(name):
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(
        node.test
    )


def nodes(name, types=True):
    """Of a module's tree; without imports that are for types only, or with."""
    todo = [tree(name)]
    while todo:
        node = todo.pop()
        yield node
        if types or not is_for_types(node):
            todo.extend(ast.iter_child_nodes(node))
        else:
            todo.extend(node.orelse)


def imported(name, types=True):
    """The names that a module imports: modules, or what is in them."""
    for node in nodes(name, types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name, types=True):
    """The modules of the package that a module imports."""
    found = set()
    for target in imported(name, types):
        while target not in SOURCES and "." in target:
            target = target.rpartition(".")[0]
        if target in SOURCES:
            found.add(target)
    return found


def dotted(node):
    """The names "a", "a.b", "a.b.c" that an expression begins with, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def mentions(name):
    """Names of imports and attributes, and strings that could be such names.

    That is no prose: a docstring may speak of everything.
    """
    yield from imported(name)
    for node in nodes(name):
        if isinstance(node, ast.Attribute):
            yield node.attr
            yield dotted(node)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[\w.]+", node.value):
                yield node.value


def test_the_sources_are_found():
    assert {"keras_vo", "keras_vo.search.engine"} <= set(SOURCES)
    assert own_imports("keras_vo.checks") == {"keras_vo.search.credit"}
    assert "tf.distribute.ReduceOp" in set(
        mentions("keras_vo.replicas.communicator")
    )


def test_every_room_is_known():
    assert {room_of(name) for name in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name):
    """Those for types only, too."""
    allowed = ROOMS[room_of(name)]
    rooms = {room_of(target) for target in own_imports(name)}
    if allowed is not None:
        assert rooms <= allowed | {room_of(name)}


def test_there_is_no_cycle():
    """But of types, which are no imports when the package runs."""
    left = {name: own_imports(name, types=False) for name in SOURCES}
    while left:
        done = [name for name in left if not left[name] & set(left)]
        assert done, f"a cycle in or below {sorted(left)}"
        for name in done:
            del left[name]


@pytest.mark.parametrize("name", SOURCES)
def test_only_replicas_know_of_strategies(name):
    found = [
        mention
        for mention in mentions(name)
        if re.match(r"(tf|tensorflow)\.distribute\b", mention)
        or ("tensorflow.python" in mention and name != TENSORFLOW_COMPAT)
    ]
    assert room_of(name) == "replicas" or not found


@pytest.mark.parametrize("name", SOURCES)
def test_only_keras_compat_knows_what_is_private_in_keras(name):
    found = {
        mention
        for mention in mentions(name)
        if mention in PRIVATE or re.match(r"keras\.src\b", mention)
    }
    assert room_of(name) == "keras_compat" or not found


def own_private_names():
    """Methods, functions, attributes and variables that the package makes."""
    made = set()
    for name in SOURCES:
        for node in nodes(name):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                made.add(node.name)
            elif isinstance(node, ast.Attribute) and dotted(node).startswith(
                "self."
            ):
                if isinstance(node.ctx, ast.Store):
                    made.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
    return {n for n in made if n.startswith("_")} - PRIVATE


@pytest.mark.parametrize("name", SOURCES)
def test_private_attributes_are_the_packages_own(name):
    """Of whatever object: that of Keras are in keras_compat, or nowhere."""
    found = {
        node.attr
        for node in nodes(name)
        if isinstance(node, ast.Attribute)
        and re.match("_(?!_)", node.attr)
        and node.attr
        not in ("_replace", "_asdict", "_fields")  # of a NamedTuple
    }
    if room_of(name) != "keras_compat":
        assert found <= own_private_names()


@pytest.mark.parametrize("name", SOURCES)
def test_modules_are_short(name):
    lines = SOURCES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES


def length(function):
    """Lines of a function's body, without its docstring."""
    first = function.body[0]
    start = first.lineno
    if ast.get_docstring(function) is not None:
        start = first.end_lineno + 1
    return function.end_lineno - start + 1


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short(name):
    lengths = {
        node.name: length(node)
        for node in nodes(name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    long = {
        function: lines
        for function, lines in lengths.items()
        if lines > MOST_LINES_OF_A_FUNCTION
    }
    assert not long
