"""The pages: their Python blocks run, links lead somewhere, and the table of options is that of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import list_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RANKS = re.compile(r"# torchrun --nproc-per-node (\d+)\n")
SKETCHES = ("megatron_bridge.md", "torchtitan.md")
"""Their blocks need stacks that are not installed here: they are only compiled."""
ELSEWHERE = ("data.md", "extending.md", "huggingface.md")
"""Pages whose blocks are pieces that need something before them: test_data_*, test_schemes, test_families, test_scorers
and test_huggingface_docs run those."""


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{index}")
    for page in PAGES
    if page.name not in (*SKETCHES, *ELSEWHERE)
    for index, block in enumerate(python_blocks(page))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    command = [sys.executable, str(script)]
    if ranks := RANKS.match(block):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks[1]]
        command = [sys.executable, *launcher, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_python(name: str) -> None:
    blocks = python_blocks(ROOT / "docs" / "integrations" / name)
    assert blocks
    for block in blocks:
        compile(block, name, "exec")


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"({name})" in index, name


def test_the_table_of_options_is_that_of_the_code() -> None:
    expected = list_options.markdown()
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == expected, (
        "python tools/list_options.py > docs/options.md"
    )
