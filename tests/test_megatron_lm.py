"""The Megatron-LM plug-in without Megatron-LM's training: options, refusals, the table of patches, the launcher. Whole
runs are in test_megatron_lm_training.py."""

import argparse
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_tw.integrations import patches
from megatron_tw.integrations.megatron_lm.checks import REFUSED, check_arguments
from megatron_tw.integrations.megatron_lm.options import add_arguments, asked_for, options_from
from megatron_tw.integrations.megatron_lm.seams import CORE_SEAMS, TRAINING_SEAMS, check_seams, seam

DENSE = ["--token-weighting", "dense", "--short-window", "64"]
SEQ_LENGTH = 256


def parse(*argv: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(list(argv))


def arguments(**changes: Any) -> Any:
    """What Megatron-LM's own arguments look like, of those that are read."""
    own = {refusal.name: None for refusal in REFUSED}
    return SimpleNamespace(**{**own, "seq_length": SEQ_LENGTH, "calculate_per_token_loss": True, **changes})


def test_options_become_a_schedule():
    options = options_from(
        parse(*DENSE, "--token-weighting-interpolation", "0.5", "--short-stride", "48", "--short-window-bos-id", "1")
    )
    assert options is not None
    scheme: Any = options.schedule().at(0)
    assert (scheme.interpolation, options.bos_id) == (0.5, 1)
    windows = options.windows_of_rows(SEQ_LENGTH)
    assert windows is not None
    assert (windows.tokens, windows.stride) == (64, 48)


def test_stages_and_lists():
    options = options_from(
        parse(*DENSE, "--token-weighting-schedule", "0: uniform; 4: base", "--token-weighting-transforms", "minus,exp")
    )
    assert options is not None
    assert options.weighting.transforms == ("minus", "exp")
    assert options.weighting.weighting_schedule == "0: uniform; 4: base"


def test_nothing_asked_for():
    assert options_from(parse()) is None
    assert options_from(SimpleNamespace()) is None, "arguments that know nothing of this project"
    assert not asked_for(["--lr", "1", "--normalization", "RMSNorm"])
    assert asked_for(["--lr", "1", "--short-window=8"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--short-window", "64"], "--short-window: is for --token-weighting, which is not given"),
        (["--token-weighting-truncation", "5"], "--token-weighting-truncation: is for --token-weighting, which is not"),
        (["--short-window-bos-id", "1"], "--short-window-bos-id: is for --token-weighting, which is not given"),
    ],
)
def test_options_without_a_scheme(argv, message):
    with pytest.raises(ValueError, match=message):
        options_from(parse(*argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--token-weighting", "dense"], "--short-window: the weighting compares with short windows, got none"),
        ([*DENSE[:3], "256"], "--short-window: expected less than 256, the tokens of a row"),
        ([*DENSE, "--short-stride", "64"], "--short-stride: expected "),
        ([*DENSE, "--token-weighting-interpolation", "2"], "--token-weighting-interpolation: expected "),
        (
            [*DENSE, "--token-weighting-shift", "2"],
            "--token-weighting-shift: --token-weighting dense does not have this",
        ),
        (["--token-weighting", "nonesuch"], "--token-weighting: expected one of "),
    ],
)
def test_wrong_options_are_named_as_they_are_called_here(argv, message):
    options = options_from(parse(*argv))
    assert options is not None
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments(), options)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_what_cannot_be_gone_with_is_refused_by_name(refusal):
    options = options_from(parse(*DENSE))
    assert options is not None
    check_arguments(arguments(), options)
    value: Any = "full_iteration" if "cuda_graph_impl" in refusal.name else 2
    with pytest.raises(ValueError, match=f"^{refusal.flag}: cannot go with --token-weighting"):
        check_arguments(arguments(**{refusal.name: value}), options)


def test_per_token_loss_is_demanded():
    options = options_from(parse(*DENSE))
    assert options is not None
    with pytest.raises(ValueError, match=r"^--calculate-per-token-loss: expected with --token-weighting"):
        check_arguments(arguments(calculate_per_token_loss=False), options)


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules with the names of the table, for patches of which the real ones need more than is installed here."""
    modules: dict[str, Any] = {}
    for patch in patches.PATCHES:
        module = modules.setdefault(patch.module, ModuleType(patch.module))
        setattr(module, patch.name, lambda *args, own=patch.target: own)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_patches_are_listed_idempotent_and_removable(stand_ins):
    own = {patch: getattr(stand_ins[patch.module], patch.name) for patch in patches.PATCHES}
    for name in dict.fromkeys(patch.integration for patch in patches.PATCHES):
        table = patches.patches_of(name)
        replacements: Any = {patch.name: lambda own: lambda *args: (own(*args), "weighted") for patch in table}
        for _ in range(2):
            for _ in range(2):
                patches.apply_patches(name, replacements)
                assert set(patches.applied_patches()) == set(table)
                for patch in table:
                    assert getattr(stand_ins[patch.module], patch.name)() == (patch.target, "weighted")
            for _ in range(2):
                patches.remove_patches(name)
                assert patches.applied_patches() == ()
                for patch in table:
                    assert getattr(stand_ins[patch.module], patch.name) is own[patch]


def test_a_name_that_is_gone_is_refused(stand_ins):
    del stand_ins["megatron.training.training"].get_forward_backward_func
    with pytest.raises(RuntimeError, match=r"^megatron.training.training.get_forward_backward_func: not in this"):
        patches.apply_patches(
            "megatron_lm", {patch.name: lambda own: own for patch in patches.patches_of("megatron_lm")}
        )


@pytest.mark.core
def test_seams_of_the_installed_megatron_core():
    check_seams(CORE_SEAMS)


@pytest.mark.needs_core_017
def test_seams_of_the_installed_megatron_lm():
    pytest.importorskip("megatron.training", reason="megatron.training: in Megatron-Core's wheels from 0.17 on")
    check_seams(TRAINING_SEAMS)


def test_another_signature_is_refused_by_name(monkeypatch):
    from megatron.core.models.common.language_module.language_module import LanguageModule

    monkeypatch.setattr(LanguageModule, "compute_language_model_loss", lambda self, logits, labels, scale: None)
    with pytest.raises(
        RuntimeError,
        match=r"compute_language_model_loss: expected the parameters .self, labels, logits., got .self, log",
    ):
        check_seams(CORE_SEAMS)


def test_a_missing_seam_is_refused_by_name():
    check_seams([seam("megatron.core", "nonesuch", "self", optional=True)])
    with pytest.raises(RuntimeError, match=r"^megatron.core.nonesuch: not in this version of Megatron"):
        check_seams([seam("megatron.core", "nonesuch", "self")])
    with pytest.raises(RuntimeError, match=r"^megatron.core.nonesuch.name: not in this version of Megatron"):
        check_seams([seam("megatron.core.nonesuch", "name", "self")])


SCRIPT = """
import sys
print(__name__, sys.argv, sys.path[0])
print(sorted(name for name in sys.modules if name.startswith("megatron.")))
"""


def test_off_means_off(tmp_path):
    """Without an option of this project the launcher imports nothing of Megatron's, and so rebinds nothing."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "megatron_tw.integrations.megatron_lm", str(tmp_path / "script.py"), "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    name_and_arguments, modules = done.stdout.strip().splitlines()
    assert name_and_arguments == f"__main__ {[str(tmp_path / 'script.py'), '--lr', '1']} {tmp_path}"
    assert modules == "[]"


def test_the_launcher_wants_a_script():
    command = [sys.executable, "-m", "megatron_tw.integrations.megatron_lm", "--token-weighting", "dense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "expected a training script and its arguments, got --token-weighting" in done.stderr.strip().splitlines()[-1]
