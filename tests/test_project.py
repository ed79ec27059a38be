"""The rules that hold for the project as a whole: files that must agree, which module may import which, and what a wheel holds."""

import ast
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flux_lab"
EIGHT = ["jupyterlab", "torch", "diffusers", "transformers", "matplotlib", "ipywidgets", "nbval", "pillow"]

# The order in which the data flows: a module imports only what stands above it.
CORE = [
    *["files", "config", "shapes", "tokenizer", "sentencepiece_model", "clip_tokenizer", "t5_tokenizer", "clip", "t5", "prompt", "latents"],
    *["scheduler", "embeddings", "rope", "normalization", "attention", "blocks", "transformer", "autoencoder", "image_processor"],
    *["original_layout", "checkpoints", "pipeline"],
]
AROUND = ["instruments", "exercises", "training", "inference", "sd15"]
# What the packages around the core may import of one another.
EXCEPTIONS = {"training": AROUND[-1:], "exercises": AROUND}
DRAWING = "instruments.plots"
# What the core may take from the package itself, which imports nothing when it is imported.
FROM_THE_PACKAGE = {"flux_lab.data_dir", "flux_lab.__version__"}
REFERENCE = {"diffusers", "transformers"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Names under which a distribution is imported, where they differ from its own; and what only some machines have.
IMPORT_NAMES = {"PIL": "pillow", "google": "protobuf", "yaml": "pyyaml", "IPython": "ipywidgets", "huggingface_hub": "huggingface-hub"}
OPTIONAL = {"bitsandbytes", "torchao", "triton"}


# ---- set-up files -------------------------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in project()["dependencies"] + project()["optional-dependencies"]["dev"]]


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in constraint_lines())}


def needed(names: list[str]) -> set[str]:
    """The named distributions and, as installed here, everything they need."""
    found, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def test_every_constraint_is_a_plain_pin() -> None:
    assert [line for line in constraint_lines() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert [line for line in constraint_lines() if re.match(r"nvidia|cuda|triton", line, flags=re.IGNORECASE)] == []


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_whatever_is_needed_is_pinned() -> None:
    names = [requirement.name for requirement in requirements()]
    assert {name for name in needed(names) if not name.startswith("nvidia") and name != "triton"} - pins().keys() == set()


def test_versions_installed_here_are_the_pinned_ones() -> None:
    installed = {name: Version(importlib.metadata.version(name)) for name in needed([requirement.name for requirement in requirements()])}
    differing = {name: f"{have} installed, {pins()[name]} pinned" for name, have in installed.items() if have.public != str(pins()[name])}
    if differing and not os.environ.get("CI"):
        pytest.skip(f"not the pinned versions: {differing}")
    assert differing == {}


def test_environment_names_the_eight_packages_and_the_constraints() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert plain == ["python=3.11", "pip"]
    assert sorted(pip) == sorted([*EIGHT, "-c constraints.txt", "-e .[dev]"])
    assert set(EIGHT) <= {canonicalize_name(requirement.name) for requirement in requirements()}
    assert set(EIGHT) <= pins().keys()


def test_version_and_python_agree() -> None:
    assert project()["requires-python"] == ">=3.11"
    assert project()["scripts"] == {"flux-lab": "flux_lab.__main__:main"}
    (version,) = re.findall(r'^__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), flags=re.M) or [
        project()["version"]
    ]
    assert version == project()["version"]


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)", text, flags=re.M)
    explained = set(re.findall(r"^([a-z]+):.*## ", text, flags=re.M))
    assert explained == set(phony.split()) - {"FORCE"}


# ---- imports ------------------------------------------------------------------------------------------------------------


@functools.cache
def modules() -> list[str]:
    """Every module by its dotted name inside the package; the package itself is the empty string."""
    paths = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return [".".join(path.parts).removesuffix("__init__").removesuffix(".") for path in paths]


def file_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Absolute names of all that is imported anywhere in the tree; of `from a import b` both are named: `a.b`."""
    here = ["flux_lab", *module.split(".")] if module else ["flux_lab"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions: what runs when the module is imported."""
    kept = ast.parse(ast.unparse(tree))
    for node in ast.walk(kept):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return kept


def module_in(name: str) -> str | None:
    """The module of the package that an imported name means, e.g. `rope` for `flux_lab.rope.FluxPosEmbed`; None if there is no rule."""
    parts = name.split(".")
    if parts[0] != "flux_lab" or name in FROM_THE_PACKAGE:
        return None
    inside = parts[1:]
    while inside and ".".join(inside) not in modules():
        inside.pop()
    return ".".join(inside)


def import_fault(importer: str, target: str) -> str | None:
    """Why `importer` may not import `target`, both dotted names inside the package; None if it may."""
    ours, theirs = importer.split(".")[0], target.split(".")[0]
    if importer in ("", "__main__") or ours == theirs:
        return None
    if ours in CORE:
        if theirs not in CORE:
            return f"the core imports {target or 'the package itself'}"
        return None if CORE.index(theirs) < CORE.index(ours) else f"{theirs} stands below {ours}"
    if theirs in AROUND and target != DRAWING and theirs not in EXCEPTIONS.get(ours, []):
        return f"{ours} imports {theirs}"
    return None


EVERY_MODULE = pytest.mark.parametrize("module", modules(), ids=lambda module: module or "flux_lab")


@EVERY_MODULE
def test_module_has_a_place(module: str) -> None:
    assert module.split(".")[0] in ["", "__main__", *CORE, *AROUND], "a new flat module takes its place in CORE, in the order of the data"


@EVERY_MODULE
def test_imports_go_one_way(module: str) -> None:
    is_package = file_of(module).name == "__init__.py"
    targets = {module_in(name) for name in imported(tree_of(module), module, is_package)} - {None}
    assert [fault for target in sorted(targets) if (fault := import_fault(module, target))] == []


def test_package_itself_imports_only_the_core() -> None:
    targets = {module_in(name) for name in imported(at_module_level(tree_of("")), "", is_package=True)} - {None, ""}
    assert targets <= set(CORE)


@EVERY_MODULE
def test_reference_is_only_imported_where_it_is_compared_with(module: str) -> None:
    everywhere = {name.split(".")[0] for name in imported(tree_of(module), module)}
    on_import = {name.split(".")[0] for name in imported(at_module_level(tree_of(module)), module)}
    assert on_import & REFERENCE == set()
    if module in ("", *CORE):
        assert everywhere & (REFERENCE | {"matplotlib"}) == set()


@EVERY_MODULE
def test_third_party_imports_are_declared(module: str) -> None:
    names = {name.split(".")[0] for name in imported(tree_of(module), module)} - set(sys.stdlib_module_names) - {"flux_lab", ""} - OPTIONAL
    declared = {canonicalize_name(Requirement(text).name) for text in project()["dependencies"]}
    assert {canonicalize_name(IMPORT_NAMES.get(name, name)) for name in names} - declared == set()


@EVERY_MODULE
def test_nothing_is_pickled(module: str) -> None:
    tree = tree_of(module)
    assert {name.split(".")[0] for name in imported(tree, module)} & PICKLES == set()
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if call in ("torch.load", "torch.save")] == []
    allowed = [ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
    assert set(allowed) <= {"False"}


@EVERY_MODULE
def test_module_has_its_test(module: str) -> None:
    name = module.replace("__main__", "main")
    if not name or file_of(module).name == "__init__.py":
        return
    package, _, stem = name.rpartition(".")
    accepted = [f"test_{stem}.py", f"test_{name.replace('.', '_')}.py", f"{package or '.'}/test_{stem}.py", f"test_{package or stem}.py"]
    accepted += [f"test_{parent}{suffix}.py" for parent in package.split(".")[1:] for suffix in ("", f"_{stem}")]
    assert any((ROOT / "tests" / path).exists() for path in accepted), f"none of {accepted} exists in tests/"


@pytest.mark.parametrize(
    ("importer", "target", "fault"),
    [
        ("rope", "config", None),
        ("config", "rope", "rope stands below config"),
        ("attention", "instruments.trace", "the core imports instruments.trace"),
        ("latents", "", "the core imports the package itself"),
        ("inference.fast", "transformer", None),
        ("inference.fast", "instruments.plots", None),
        ("inference.fast", "instruments.trace", "inference imports instruments"),
        ("training.sd15", "sd15.unet", None),
        ("sd15.unet", "training.flow", "sd15 imports training"),
        ("exercises.rope", "sd15.unet", None),
        ("__main__", "inference.fast", None),
    ],
)
def test_import_rule(importer: str, target: str, fault: str | None) -> None:
    assert import_fault(importer, target) == fault


def test_every_form_of_import_is_seen() -> None:
    text = "import a.b\nfrom .rope import x\nfrom . import config\ndef f():\n    from ..latents import y\n    import diffusers"
    names = set(imported(ast.parse(text), "training.flow"))
    assert names == {"a.b", "flux_lab.training.rope.x", "flux_lab.training.config", "flux_lab.latents.y", "diffusers"}
    assert "diffusers" not in set(imported(at_module_level(ast.parse(text)), "training.flow"))
    assert set(imported(ast.parse("from .core import z"), "exercises", is_package=True)) == {"flux_lab.exercises.core.z"}


# ---- the package as it is imported and installed ------------------------------------------------------------------------


def run_python(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("statement", ["import flux_lab", "from flux_lab import FluxPipeline, load_mini"])
def test_import_brings_in_no_reference_and_no_plotting(statement: str) -> None:
    heavy = sorted(REFERENCE | {"matplotlib", "ipywidgets", "jupyterlab", "huggingface_hub", "sentencepiece"})
    assert run_python(f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])", cwd=ROOT) == "[]"


@pytest.mark.slow
def test_import_takes_half_a_second_more_than_torch() -> None:
    code = "import time, torch; start = time.process_time(); import flux_lab; print(time.process_time() - start)"
    assert min(float(run_python(code, cwd=ROOT)) for _ in range(3)) <= 0.5


@pytest.mark.slow
def test_wheel_installed_elsewhere_finds_the_miniature(tmp_path: Path) -> None:
    if not (ROOT / "data" / "flux-mini" / "model_index.json").exists():
        pytest.skip("data/flux-mini is not there")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = "import flux_lab; print(flux_lab.__file__); print(flux_lab.data_dir()); "
    code += "print(*[len(flux_lab.load_mini(kind).vae.state_dict()) for kind in ('dev', 'schnell')])"
    file, data, counts = run_python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}).splitlines()
    assert Path(file).is_relative_to(site)
    assert Path(data) == site / "flux_lab" / "data"
    assert len(set(counts.split())) == 1
    assert int(counts.split()[0]) > 100
