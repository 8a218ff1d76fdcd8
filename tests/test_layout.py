"""The architecture's rules, read from the sources."""

import ast
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS, MODEL, CSRC = ROOT / "omnimamba_kernels", ROOT / "omnimamba_model", ROOT / "csrc"
IMPLEMENTATIONS = ("reference", "native_impl", "triton_impl", "cuda_impl")
LONGEST_FILE, LONGEST_OF_MODEL, LONGEST_FUNCTION, LONGEST_KERNEL = 400, 300, 60, 150
CODE = (".py", ".h", ".cpp", ".cu", ".cuh")

if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not here", allow_module_level=True)


def files(*folders, suffixes=CODE):
    """Source files under the folders, without what the build wrote."""
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    return [path for path in found if path.name != "_build_info.py"]


def name(path):
    return str(path.relative_to(ROOT))


@cache
def tree(path):
    return ast.parse(path.read_text(), filename=str(path))


def imports(path):
    """Absolute dotted names of all that a file imports, `from a import b` as `a.b`."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*prefix, alias.name]) for alias in node.names)


def operations():
    return [folder for folder in sorted(KERNELS.iterdir()) if (folder / "api.py").exists()]


PYTHON = files(KERNELS, MODEL, suffixes=(".py",))
TRITON = [path for path in PYTHON if path.parent.parent == KERNELS and path.stem.startswith("triton_")]
EVERYTHING = files(KERNELS, MODEL, CSRC, ROOT / "tests", ROOT / "bench")


def test_there_is_something_to_check():
    assert len(operations()) >= 6
    assert len(files(CSRC)) >= 6


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_files_are_short(path):
    longest = LONGEST_OF_MODEL if path.is_relative_to(MODEL) else LONGEST_FILE
    assert len(path.read_text().splitlines()) <= longest


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            start = node.body[0].end_lineno if documented else node.lineno
            longest = LONGEST_KERNEL if is_kernel(node) else LONGEST_FUNCTION
            assert node.end_lineno - start <= longest, f"{node.name} is too long"


def is_kernel(function):
    """Whether Triton compiles the function."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_packages_read_no_environment_and_never_exit(path):
    calls = {"environ", "environb", "getenv", "putenv", "unsetenv", "_exit"}
    used = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    imported = {dotted.rsplit(".", 1)[-1] for dotted in imports(path) if dotted.startswith("os.")}
    if path == MODEL / "training" / "parallel.py":
        calls -= {"_exit"}  # leave() tells why
    assert not (used | imported) & calls


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_only_the_command_line_prints(path):
    called = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    prints = [func for func in called if isinstance(func, ast.Name) and func.id == "print"]
    assert not prints or path.is_relative_to(MODEL / "cli") or path.name == "__main__.py"


@pytest.mark.parametrize("path", files(KERNELS, suffixes=(".py",)), ids=name)
def test_kernels_know_nothing_of_the_model(path):
    assert not [dotted for dotted in imports(path) if dotted.split(".")[0] == "omnimamba_model"]


@pytest.mark.parametrize("path", files(MODEL, suffixes=(".py",)), ids=name)
def test_model_uses_public_kernel_names_only(path):
    import omnimamba_kernels

    allowed = {f"omnimamba_kernels.{public}" for public in omnimamba_kernels.__all__}
    allowed |= {"omnimamba_kernels", "omnimamba_kernels.info", "omnimamba_kernels.__version__"}
    used = {dotted for dotted in imports(path) if dotted.split(".")[0] == "omnimamba_kernels"}
    assert not used - allowed


@pytest.mark.parametrize("path", [p for op in operations() for p in files(op, suffixes=(".py",))], ids=name)
def test_implementations_do_not_import_one_another(path):
    """An implementation may use its own kind in another operation (a reference built from references), no other kind;
    the public side reaches all of them through the choice of back end."""
    modules = {part for dotted in imports(path) for part in dotted.split(".")}
    assert not modules & set(IMPLEMENTATIONS) - {path.stem}
    if not path.stem.startswith("triton_"):
        assert not [module for module in modules if module.startswith("triton") and module != "triton_launch"]


@pytest.mark.parametrize("operation", operations(), ids=name)
def test_every_operation_has_the_same_files(operation):
    present = {path.name for path in operation.glob("*.py")}
    assert {"__init__.py", "api.py", "reference.py", "cases.py"} <= present
    for path in operation.glob("*_impl.py"):
        defined = {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
        assert {"why_not", "forward"} <= defined, path.name
    assert (operation / "triton_impl.py").exists() == (operation / "launch.json").exists()


@pytest.mark.parametrize("path", TRITON, ids=name)
def test_triton_kernels_are_started_in_one_place(path):
    """``launch`` alone starts kernels: on the right device and stream, and noted where that is asked for."""
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [ast.unparse(call) for call in calls if isinstance(call, ast.Subscript)]
    assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in ("run", "warmup")]
    assert not [dotted for dotted in imports(path) if dotted.startswith(("torch.cuda", "triton.runtime"))]
    used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert not [text for text in used if text.startswith("torch.cuda")]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*/launch.json")), ids=name)
def test_launch_tables_are_valid_and_used(path):
    table = json.loads(path.read_text())
    sources = [*path.parent.glob("triton_*.py"), *path.parent.glob("tiles.py")]  # tiles: host code without triton
    nodes = [node for source in sources for node in ast.walk(tree(source))]
    named = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for kernel, rules in table.items():
        assert kernel in named, f"{kernel} is not a kernel of {path.parent.name}"
        for rule in rules:
            assert {"use"} <= set(rule) <= {"arch", "when", "use"}
            assert all(re.fullmatch(r"interpreter|(sm_|gfx)\w*", arch) for arch in rule.get("arch", []))
            assert all(0 <= low <= high for low, high in rule.get("when", {}).values())
            assert rule["use"] and all(type(value) is int for value in rule["use"].values())
        assert set(rules[-1]) == {"use"}, f"the last rule of {kernel} must always fit"


@pytest.mark.parametrize("path", files(CSRC), ids=name)
def test_includes_stay_in_their_layer(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)
    assert not [header for header in included if header.split("/")[0] in ("torch", "ATen", "c10")]
    if path.parent != CSRC:
        assert not [header for header in included if header.startswith("pybind11") or header == "Python.h"]
    if path.parent != CSRC / "common":
        assert not [header for header in included if header in ("immintrin.h", "arm_neon.h", "omp.h")]


@pytest.mark.parametrize("path", files(CSRC), ids=name)
def test_assembly_stays_in_the_device_vocabulary(path):
    """Kernels speak of functions; instructions, barriers and launches are written once, in csrc/common."""
    if path.parent not in (CSRC / "common", CSRC / "host_gpu"):
        assert not re.search(r"\basm\b|__sync|__shfl|__shared__|<<<", path.read_text())


@pytest.mark.parametrize("path", files(CSRC), ids=name)
def test_native_code_does_not_touch_the_process(path):
    assert not re.search(r"\b(getenv|setenv|exit|abort|printf|std::cout|std::cerr)\b", path.read_text())


def test_readme_tree_names_the_top_level():
    """Each unindented line of README's tree begins with something that exists, and nothing tracked is left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    trees = [block for block in blocks if re.search(r"^csrc/", block, re.M)]
    assert len(trees) == 1, "README.md needs one fenced tree with a line that begins with csrc/"
    lines = [line.split() for line in trees[0].splitlines() if line and not line[0].isspace()]
    for words in lines:
        assert (ROOT / words[0]).exists(), f"README's tree names {words[0]}, which does not exist"
    named = {word.split("/")[0] for words in lines for word in words if (ROOT / word).exists()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert not tracked - named - {".gitignore", ".gitattributes", ".ci"}
