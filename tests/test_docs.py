"""The pages: their Python blocks run, links lead somewhere, and the table of options is that of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import prepare_ready_rows, reference_rows

from tools import list_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RANKS = re.compile(r"# torchrun --nproc-per-node (\d+)\n")
SKETCHES = ("megatron_bridge.md", "torchtitan.md")
"""Their blocks need stacks that are not installed here: they are only compiled."""
ELSEWHERE = ("data.md", "extending.md", "huggingface.md")
"""Pages whose blocks are pieces that need something before them: a test below, test_schemes, test_families,
test_scorers and test_huggingface_docs run those."""


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


def test_the_blocks_on_data_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the four rows of the reference, as a folder DIR of prepared rows."""
    ids = reference_rows()
    prepare_ready_rows(ids, tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = python_blocks(ROOT / "docs" / "data.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert names["rows"][3].tolist() == ids[3].tolist()
    assert names["rows"].read(0).valid is None
    assert names["rows"].documents_R2.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
    batches = names["batches"]
    assert len(batches) == 4
    # Rank 0 of 2 takes every other sample: of the 8 of a step those of even numbers, through two epochs of four rows.
    assert [batch.row_index.tolist() for batch in batches] == [[names["order"][sample]] for sample in (0, 2, 4, 6)]
    for batch in batches:
        assert batch.tokens.tolist() == ids[batch.row_index.tolist()].tolist()
        assert batch.valid is None
    assert names["loader"].state_dict()["consumed_samples"] == 8


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
