"""README and docs: code blocks run, messages of the FAQ are ours, names and paths exist."""

from __future__ import annotations

import ast
import glob
import importlib
import inspect
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_passes
import sus_lightning

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="no docs beside the tests")
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    return [textwrap.dedent(code) for _, of, code in _FENCE.findall(page.read_text()) if of == language]


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_readme_has_the_command_that_ci_runs() -> None:
    found = re.search(r"<!-- test command -->\n```bash\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    assert "pytest" in found[1]
    assert "pip install -e '.[test]'" in found[1]


@pytest.mark.parametrize("page", _NAMES)
def test_python_blocks_parse(page: str) -> None:
    for code in _blocks(ROOT / page, "python"):
        ast.parse(code)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _module() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _Attention()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def _llama(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    ids = torch.randint(0, 32, (1, 24))
    args = transformers.TrainingArguments(
        str(folder / "out"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    dataset = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (8, 24))]
    return {"path": str(folder / "llama"), "ids": ids, "args": args, "dataset": dataset}


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{n}.md" for n in ("quickstart", "lightning", "pytorch", "huggingface", "choosing-c"))],
)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is one program; what its reader brings along is tiny, and no Inductor runs."""
    from fx_passes.huggingface import SUSTrainerCallback

    for owner in (fx_passes.SUSBackend, sus_lightning.SUSBackprop, SUSTrainerCallback):
        parameters = list(inspect.signature(owner).parameters.values())
        defaults = tuple("eager" if p.name == "compiler" else p.default for p in parameters)
        monkeypatch.setattr(owner.__init__, "__defaults__", defaults)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = _blocks(ROOT / page, "python")
    assert blocks
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    given: dict[str, Any] = {"batch": torch.randn(1, 64, 16), "q": q, "k": k, "v": v}
    given |= {"module": _module(), "data": torch.utils.data.DataLoader(torch.randn(8, 32, 16), batch_size=2)}
    if any("transformers" in code for code in blocks):
        given |= _llama(tmp_path)
    for code in blocks:
        if "explain(model" in code or "torch.compile(model" in code or "sus_backward" in code:
            given["model"] = _Attention()
        exec(compile(code, page, "exec"), given)  # our own text
        torch._dynamo.reset()


def _templates() -> list[str]:
    """All strings in the source, "..." for what is formatted into them."""
    found = []
    for file in [*(ROOT / "fx_passes").rglob("*.py"), *(ROOT / "sus_lightning").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_faq_are_ours() -> None:
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    templates = _templates()
    for heading in headings:
        pieces = [piece.strip() for piece in heading.split("...") if piece.strip(" :.")]
        assert any(all(piece in template for piece in pieces) for template in templates), heading


@pytest.mark.parametrize("page", _NAMES)
def test_paths_exist(page: str) -> None:
    """Files of this repository that a page names, and links of the README."""
    text = _prose(ROOT / page)
    named = re.findall(r"`((?:fx_passes|sus_lightning|benchmarks|tests|examples|docs|\.ci)/[\w./*-]+)", text)
    if page == "README.md":
        named += re.findall(r"\]\((docs/[\w./-]+)", text)
    for path in named:
        assert glob.glob(str(ROOT / path.rstrip("."))), f"{page} names {path}"


@pytest.mark.parametrize("page", _NAMES)
def test_options_of_commands_exist(page: str) -> None:
    for script, options in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)([^`#\n]*)", (ROOT / page).read_text()):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z][\w-]*", options):
            assert f'"{option}"' in source, f"{page}: {script} has no {option}"


def test_the_site_is_built_with_its_warnings() -> None:
    """`mkdocs build --strict` counts what it prints: with --quiet no warning fails it."""
    files = [*(ROOT / ".ci").glob("*"), *(ROOT / ".github/workflows").glob("*")]
    builds = [line for file in files for line in file.read_text().splitlines() if "mkdocs build" in line]
    for line in builds:
        assert "--strict" in line
        assert "-q" not in line.split("#")[0], line


def _documented() -> set[str]:
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))


def test_api_pages_have_every_public_name() -> None:
    objects = set()
    for path in _documented():
        module, name = path.rsplit(".", 1)
        found = getattr(importlib.import_module(module), name)
        assert found.__doc__, path
        objects.add(id(found))
    for package in (fx_passes, sus_lightning):
        names = [name for name in package.__all__ if name != "__version__"]
        missing = [name for name in names if id(getattr(package, name)) not in objects]
        assert not missing, f"{package.__name__}: {missing}"


def test_public_callables_say_arguments_errors_and_an_example() -> None:
    given_back = {"Report", "Site", "Expectation", "Summary", "Schedule"}  # nobody calls these
    for path in _documented():
        module, name = path.rsplit(".", 1)
        doc = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
        if name not in given_back:
            assert all(f"\n{section}:\n" in doc for section in ("Args", "Raises", "Examples")), path


def test_members_on_api_pages_exist() -> None:
    """mkdocstrings leaves out what it does not find, without a word."""
    for page in (ROOT / "docs/api").glob("*.md"):
        for path, members in re.findall(
            r"^::: ([\w.]+)\n    options:\n      members: \[(.+)\]", page.read_text(), re.M
        ):
            module, name = path.rsplit(".", 1)
            found = getattr(importlib.import_module(module), name)
            assert all(hasattr(found, member) for member in members.split(", ")), path


@pytest.mark.parametrize(
    ("page", "heading", "of"),
    [
        ("lightning", "## Arguments", "SUSBackprop"),
        ("choosing-c", "# Choosing c", "AutoC"),
        ("lightning", "`VarianceTarget` finds", "VarianceTarget"),
    ],
)
def test_tables_of_arguments_are_complete(page: str, heading: str, of: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text().split(heading, 1)[1]
    rows = re.search(r"\| [^\n]*argument[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", text)
    assert rows is not None
    named = [name for row in rows[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert set(named) == set(inspect.signature(getattr(sus_lightning, of)).parameters)


def test_diagrams_are_what_their_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs/diagrams.py"))
    for name, draw in (("kept-entries", "kept_entries"), ("systematic", "systematic_line"), ("pipeline", "pipeline")):
        assert script[draw]() == (ROOT / f"docs/img/{name}.svg").read_text(), f"run python docs/diagrams.py: {name}"


def test_citation_is_the_same_everywhere() -> None:
    (entry,) = _blocks(README, "bibtex")
    assert _blocks(ROOT / "docs/index.md", "bibtex") == [entry]
    assert "arXiv:2505.15080" in entry
