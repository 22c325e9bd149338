# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The README and the pages in docs/ are true: their code runs, their links lead somewhere.

A page is read from top to bottom in an empty folder. ``python`` blocks run in one namespace,
``lightning-edit`` lines of ``bash`` blocks as commands. A ``yaml`` block is written to the file
that its first line names; a section of a configuration is also parsed. A tiny model stands in for
``smollm2``. A block after a comment ``<!-- not run: reason -->`` is left out.
"""

from __future__ import annotations

import logging
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_edit
import lightning_edit.artifacts.adapters
import lightning_edit.artifacts.folders
import lightning_edit.models
from lightning_edit.__main__ import main
from lightning_edit.artifacts.catalog import offers
from lightning_edit.cli.verbs import VERBS
from lightning_edit.demos import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(
    r"^(?P<left_out><!-- not run: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
SECTIONS = {"model", "data", "trainer"}
# Commands that a test cannot run: they install, or run the tests themselves.
OTHER_COMMANDS = ("cd", "git clone", "make", "pip install")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    is_run: bool

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name,
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            match["left_out"] is None,
        )
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def ids(page: Path) -> str:
    return page.stem


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with as many layers as the pages edit, random weights, and the tiny tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("stand_in")
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> Path:
    """An empty folder where ``smollm2`` is the stand-in, with the repository's configurations."""
    resolve = lightning_edit.models.resolve_model

    def resolve_model(model: str, **settings: Any) -> str:
        return str(stand_in) if model == "smollm2" else resolve(model, **settings)

    for module in (
        lightning_edit.models,
        lightning_edit.artifacts.adapters,
        lightning_edit.artifacts.folders,
    ):
        monkeypatch.setattr(module, "resolve_model", resolve_model)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    return folder


@contextmanager
def restored_logging() -> Iterator[None]:
    """Takes back what the command line sets up for a process of its own."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in (*names, "lightning.fabric.utilities.rank_zero")]
    kept = [list(logger.filters) for logger in loggers]
    try:
        yield
    finally:
        for logger, filters in zip(loggers, kept, strict=True):
            logger.filters[:] = filters


# The stand-in knows nothing, so editors and callbacks find fault with it.
@pytest.mark.filterwarnings("ignore:.*update direction and the key:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not know what it is to forget:UserWarning")
# A guard says what it took back.
@pytest.mark.filterwarnings("ignore:EditGuard took back the edit of:UserWarning")
@pytest.mark.filterwarnings("ignore:.*edits did not take:UserWarning")
# Pages train a few steps in Trainers with few settings.
@pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`val_dataloader`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning")
# A page gives a command line of its own its words, where the test's before it are still there.
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
# peft asks a model in a way that transformers is about to retire.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_runs(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.language == "python":
            # As many line breaks before it as on the page, for tracebacks to point there.
            code = compile("\n" * block.line + block.text, block.page, "exec")
            exec(code, space)  # noqa: S102
        elif block.language == "bash":
            for line in commands(block):
                run(line, block, capsys)
        elif block.language == "yaml":
            write(block)


def run(line: str, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    if words[0] != "lightning-edit":
        assert line.startswith(OTHER_COMMANDS), f"{block.where}: what is `{line}`?"
        return
    target = None
    if ">" in words:
        words, target = words[: words.index(">")], Path(words[-1])
    capsys.readouterr()
    try:
        with restored_logging():
            status: Any = main(words[1:])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert not status, f"{block.where}: `{line}` failed:\n{printed.out}\n{printed.err}"
    if target is not None:
        target.write_text(printed.out, encoding="utf-8")


def write(block: Block) -> None:
    content = yaml.safe_load(block.text)
    named = re.match(r"# (\S+\.ya?ml)\n", block.text)
    if named:
        Path(named[1]).write_text(block.text, encoding="utf-8")
    if isinstance(content, dict) and set(content) <= SECTIONS:
        assert named, f"{block.where}: name the file of this configuration in its first line."
        with pytest.raises(SystemExit) as stop, restored_logging():
            main(["fit", "-c", "edit", "-c", named[1], "--print_config"])
        assert not stop.value.code, block.where


def test_links_lead_somewhere(subtests: pytest.Subtests) -> None:
    for page in PAGES:
        with subtests.test(page.name):
            for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
                target = match["target"]
                if target.startswith(("http://", "https://")):
                    continue
                name, _, anchor = target.partition("#")
                file = (page.parent / name).resolve() if name else page
                assert file.exists(), f"{page.name}: `{target}` does not exist"
                if page.is_relative_to(ROOT / "docs"):
                    assert file.is_relative_to(ROOT / "docs"), (
                        f"{page.name}: `{target}` is not in the site"
                    )
                if anchor:
                    assert anchor in anchors(file), f"{page.name}: `{target}` has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(re.findall(r"[\w/]+\.md", str(navigation)))
    docs = ROOT / "docs"
    assert named == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}


def pages_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_every_public_name_and_verb_is_described() -> None:
    # In the text itself, in backticks: a name that only occurs in an example is not described.
    text = FENCE.sub("", pages_text())
    named = set(re.findall(r"`(?=(\w+)\b[^`]*`)", text))
    # Methods are described by the reference, which is made of their docstrings.
    elsewhere = {
        name
        for name in set(lightning_edit.__all__) - {"__version__"}
        if getattr(lightning_edit, name).__module__.startswith("lightning_edit.modules.")
    }
    assert set(lightning_edit.__all__) - named - elsewhere == {"__version__"}
    described = set(re.findall(r"^\| `([\w-]+)", text, re.MULTILINE))
    assert set(VERBS) - described == set()


def test_every_configuration_is_described_and_parses(
    workplace: Path, subtests: pytest.Subtests
) -> None:
    text = FENCE.sub("", pages_text())
    for path in CONFIGS:
        name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        base = [] if name == "edit" or path.parent.name == "f_learning" else ["-c", "edit"]
        with subtests.test(name):
            # Those of methods say themselves what they are, and `list` shows it.
            is_described = re.search(rf"`{name}(\.yaml)?`", text)
            assert is_described or path.parent.name == "method", f"`{name}` is on no page"
            if path.parent.name == "benchmark":
                continue  # a study, which `compare` parses
            with pytest.raises(SystemExit) as stop, restored_logging():
                main(["fit", *base, "-c", name, "--print_config"])
            assert not stop.value.code


def test_every_method_has_a_configuration() -> None:
    configured = {
        yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["class_path"]
        for path in (ROOT / "configs" / "method").glob("*.yaml")
    }
    assert configured >= {offer.name for offer in offers("methods")}


def test_make_and_pip_name_what_there_is() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    for block in (block for page in PAGES for block in blocks(page)):
        for line in commands(block) if block.language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert words[1] in targets, f"{block.where}: no target `{words[1]}`"
            for named in re.findall(r"(?:lightning-edit|-e '?\.)\[([\w,-]+)\]", line):
                assert set(named.split(",")) <= extras, f"{block.where}: no extra in `{line}`"


def test_the_first_block_of_the_readme_is_what_a_newcomer_types() -> None:
    first = blocks(ROOT / "README.md")[0]
    assert first.language == "bash"
    assert [line.split("#")[0].strip() for line in commands(first)] == ["make demo", "make test"]


def test_every_block_names_its_language(subtests: pytest.Subtests) -> None:
    for page in PAGES:
        with subtests.test(page.name):
            text = page.read_text(encoding="utf-8")
            assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(page))


def test_code_fits_on_the_page(subtests: pytest.Subtests) -> None:
    for page in PAGES:
        with subtests.test(page.name):
            for block in blocks(page):
                if block.language == "python":
                    assert max(map(len, block.text.splitlines())) <= 100, block.where


def test_blocks_left_out_are_few() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    left_out = [block for block in found if not block.is_run]
    assert len(left_out) * 5 < len(found), [block.where for block in left_out]
