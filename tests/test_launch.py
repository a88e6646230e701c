"""The published recipe's script, which bash and torchrun both take: on 4 CPU ranks, and from a cluster's variables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import make_folder
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, PContext, SignalException

from megatron_tw.config import RunConfig, check_config, parse_options
from tools import launch as launcher

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "extend_llama3_32k.sh"
PHI2 = SCRIPT.with_name("extend_phi2_32k.sh")
LAUNCHER = (
    "SLURM_",
    "MASTER_",
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "MAX_RESTARTS",
    "LOG_DIR",
    "GPUS_PER_NODE",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
)
TIMEOUT_SECONDS = 300
Launch = Callable[..., subprocess.CompletedProcess[str]]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without a launcher's variables and without GPUs (there may be fewer than ranks); this
    interpreter and this checkout come first."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    ours = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ours |= {"CUDA_VISIBLE_DEVICES": ""}
    return clean | ours | variables


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's 4 rows of 256 tokens, as tools/preprocess_data.py writes them."""
    folder = tmp_path_factory.mktemp("rows")
    with np.load(ROOT / "tests" / "reference" / "windows.npz") as reference:
        lines = [json.dumps({"input_ids": row.tolist()}) for row in reference["input_ids"]]
    (folder / "ids.jsonl").write_text("\n".join(lines))
    options = ["--tokenizer", "none", "--vocab-size", "320", "--bos-id", "1", "--seq-length", "256"]
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    arguments = [*options, "--input", str(folder / "ids.jsonl"), "--output", str(folder / "rows")]
    subprocess.run([*tool, *arguments], check=True, env=environment(), timeout=TIMEOUT_SECONDS, capture_output=True)
    return folder / "rows"


def overrides(rows: Path, save: Path) -> list[str]:
    """The recipe cut down to the tiny checkpoint, 4 ranks and 3 steps."""
    return [
        *("--load-hf", str(ROOT / "tests" / "reference" / "tiny_llama"), "--data-path", str(rows), "--save", str(save)),
        *("--seq-length", "256", "--short-window", "64", "--short-stride", "48", "--no-bf16"),
        *("--train-iters", "3", "--global-batch-size", "2", "--save-interval", "null"),
        *("--tensor-model-parallel-size", "1", "--context-parallel-size", "2"),
    ]


WAYS = {
    "bash": (["bash", str(SCRIPT)], {"NPROC_PER_NODE": "2", "LOG_DIR": "logs"}),
    "torchrun": (["torchrun", "--standalone", "--nproc-per-node", "2", str(SCRIPT)], {}),
}


@pytest.mark.parametrize("ways", [["bash"], pytest.param(["bash", "torchrun"], marks=pytest.mark.full)])
def test_bash_and_torchrun_run_the_same_recipe(ways: list[str], rows: Path, tmp_path: Path) -> None:
    metrics, configs = {}, {}
    for name in ways:
        command, variables = WAYS[name]
        save = tmp_path / name
        result = subprocess.run(
            command + overrides(rows, save),
            env=environment(**variables),
            cwd=tmp_path,  # not the repository: nothing may depend on it
            timeout=TIMEOUT_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        metrics[name] = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        configs[name] = parse_options(["--config", str(save / "iter_0000003" / "config.yaml")], RunConfig)

    for name, steps in metrics.items():
        assert [step["iteration"] for step in steps] == [1, 2, 3], name
        assert all(np.isfinite(step["weighted_loss"]) and step["weight_std"] > 0 for step in steps), name
        config = configs[name]
        assert (config.weighting.weighting, config.weighting.interpolation) == ("dense", 0.75)  # the recipe's
        assert (config.model.rotary_base, config.optimizer.lr, config.optimizer.lr_warmup_iters) == (1.53e7, 2e-5, 20)
        assert (config.data.seq_length, config.compute.bf16, config.checkpoint.save_interval) == (256, False, None)
    logs = {file.parent.name: file.read_text() for file in (tmp_path / "logs").glob("node_0/*/attempt_0/*/stdout.log")}
    assert "weighting dense" in logs.pop("0")
    assert list(logs) == ["1"]
    same = ("weighted_loss", "lm_loss", "grad_norm", "learning_rate")
    for key in same:
        assert [step[key] for step in metrics["bash"]] == [step[key] for step in metrics[ways[-1]]], key


@pytest.mark.full
def test_the_recipe_of_phi2_runs_by_bash_and_by_torchrun(rows: Path, tmp_path: Path) -> None:
    model = make_folder("phi", tmp_path / "phi", num_key_value_heads=4, partial_rotary_factor=0.4, hidden_size=80)
    losses = []
    for command in (["bash", str(PHI2)], ["torchrun", "--standalone", "--nproc-per-node", "2", str(PHI2)]):
        save = tmp_path / command[0]
        tiny = ["--load-hf", str(model), "--data-path", str(rows), "--save", str(save), "--save-hf", f"{save}-hf"]
        tiny += ["--seq-length", "256", "--short-window", "64", "--short-stride", "60", "--min-short-context", "4"]
        tiny += ["--no-bf16", "--train-iters", "2", "--global-batch-size", "1", "--context-parallel-size", "2"]
        result = subprocess.run(
            command + tiny,
            env=environment(NPROC_PER_NODE="2"),
            cwd=tmp_path,
            timeout=TIMEOUT_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert "weighting dense, unfrozen scorer, windows of 64 every 60 tokens" in result.stdout
        losses.append([json.loads(line)["weighted_loss"] for line in (save / "metrics.jsonl").read_text().splitlines()])
        exported = json.loads(Path(f"{save}-hf", "config.json").read_text())
        assert exported["model_type"] == "phi"
        assert exported["rope_parameters"]["rope_theta"] == 1e6
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_the_recipe_is_the_published_one() -> None:
    """arXiv 2503.09202, Llama-3-8B."""
    needed = ["--data-path", "d", "--load-hf", "m", "--save", "s"]
    config = parse_options(["--config", str(SCRIPT.with_suffix(".yaml")), *needed], RunConfig)
    assert (config.data.seq_length, config.windows.short_window, config.windows.short_stride) == (32768, 8192, 6144)
    assert (config.train.train_iters, config.train.micro_batch_size, config.train.global_batch_size) == (240, 1, 128)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (2e-5, 0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.01, 1.0)
    assert (optimizer.lr_decay_style, optimizer.lr_warmup_iters) == ("constant", 20)
    assert (config.weighting.weighting, config.weighting.interpolation) == ("dense", 0.75)
    assert (config.checkpoint.save_interval, config.compute.bf16, config.model.rotary_base) == (30, True, 15300000.0)
    assert config.parallel.model_parallel_size == 8


def test_the_recipe_of_phi2_is_the_published_one() -> None:
    """arXiv 2503.09202: like Llama-3-8B's but for what the model's context asks; the rope base is a choice of ours."""
    needed = ["--data-path", "d", "--load-hf", "m", "--save", "s"]
    ours, llamas = (
        parse_options(["--config", str(script.with_suffix(".yaml")), *needed], RunConfig) for script in (PHI2, SCRIPT)
    )
    check_config(ours, world_size=8)
    assert (ours.data, ours.train, ours.optimizer) == (llamas.data, llamas.train, llamas.optimizer)
    assert (ours.weighting, ours.scorer, ours.compute) == (llamas.weighting, llamas.scorer, llamas.compute)
    windows = ours.windows
    assert (windows.short_window, windows.short_stride, windows.min_short_context) == (2048, 1920, 128)
    assert ours.model.rotary_base == 1e6
    assert "# Not published, so ours:" in PHI2.with_suffix(".yaml").read_text().split("rotary_base:")[0]


def test_ranks_have_time_after_a_signal_and_not_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, int]] = []
    monkeypatch.setattr(PContext, "close", lambda self, death_sig, timeout: given.append((death_sig, timeout)))
    monkeypatch.setattr(api, "_terminate_process_handler", None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    launcher.leave_time_to_save()
    context = PContext.__new__(MultiprocessContext)
    context.close()
    try:
        raise SignalException("", signal.SIGTERM)
    except SignalException:
        context.close(signal.SIGTERM, 30)
    assert given == [(None, 30), (signal.SIGTERM, 600)]


@pytest.mark.parametrize(
    ("sent", "raising", "timeout"),
    [
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], [True, False, False], 600),
        ([signal.SIGINT, signal.SIGTERM], [True, False], 600),  # a script hands on what its terminal sent to both
        ([signal.SIGINT, signal.SIGINT], [True, True], 1),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], [True, False, True], 1),
    ],
)
def test_ranks_are_waited_for_however_often_a_signal_comes(
    sent: list[signal.Signals], raising: list[bool], timeout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[object, int]] = []
    monkeypatch.setattr(PContext, "close", lambda self, death_sig, timeout: given.append((death_sig, timeout)))
    monkeypatch.setattr(api, "_terminate_process_handler", None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    launcher.leave_time_to_save()
    raised = []
    for number in sent:
        try:
            api._terminate_process_handler(number, None)
        except SignalException as error:
            raised.append(error.sigval == number)
            PContext.__new__(MultiprocessContext).close(number, 30)
        else:
            raised.append(False)
    assert raised == raising
    assert given[-1][1] == timeout


SLOW_TO_SAVE = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
print("begun", flush=True)
while not asked:
    time.sleep(0.02)
time.sleep(3)
print("saved", flush=True)
"""


@pytest.mark.full
def test_a_rank_saves_while_its_launcher_is_sent_one_signal_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(SLOW_TO_SAVE)
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), "--standalone", str(tmp_path / "rank.py")]
    env = environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.communicate(timeout=TIMEOUT_SECONDS)[0] == "saved\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_mistake_is_told_once_by_four_ranks(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", str(SCRIPT), "--tensor-model-parallel-siz", "2"],
        env=environment(NPROC_PER_NODE="4"),
        timeout=TIMEOUT_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    message = "unknown option --tensor-model-parallel-siz; did you mean --tensor-model-parallel-size?"
    *_, told, rule = result.stderr.splitlines()  # of torchrun's summary of its ranks
    assert told == f"  traceback : error: {message}"
    assert set(rule) == {"="}
    assert result.stderr.count(message) == 1


SHOWS_HOSTNAMES = '[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"'


def put_stand_ins(folder: Path, bodies: dict[str, str]) -> None:
    """Programs in bash, by their names."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run the script with stand-ins for python (prints its arguments), nvidia-smi and scontrol; returns the process."""
    stand_ins = {
        "python": 'echo "$@"',
        "nvidia-smi": "printf 'GPU 0: x\\nGPU 1: y\\n'",
        "scontrol": SHOWS_HOSTNAMES,
    }
    put_stand_ins(tmp_path, stand_ins)

    def run(script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
        env = environment(**variables)
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        if "CUDA_VISIBLE_DEVICES" not in variables:
            del env["CUDA_VISIBLE_DEVICES"]
        return subprocess.run(
            ["bash", str(script), "--lr", "1e-5", "a b"], env=env, capture_output=True, text=True, check=False
        )

    return run


ALONE = "--standalone --max-restarts 0"
TAIL = f"{ROOT / 'tools' / 'train.py'} --config {SCRIPT.with_suffix('.yaml')} --lr 1e-5 a b"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, f"--nproc-per-node 2 {ALONE}"),
        ({"CUDA_VISIBLE_DEVICES": "0,3,5"}, f"--nproc-per-node 3 {ALONE}"),  # nvidia-smi lists 2 whatever it says
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a-2b"}, f"--nproc-per-node 1 {ALONE}"),
        ({"CUDA_VISIBLE_DEVICES": ""}, f"--nproc-per-node 1 {ALONE}"),
        ({"MAX_RESTARTS": "3"}, "--nproc-per-node 2 --standalone --max-restarts 3"),
        ({"GPUS_PER_NODE": "8"}, f"--nproc-per-node 8 {ALONE}"),
        ({"GPUS_PER_NODE": "8", "NPROC_PER_NODE": "4"}, f"--nproc-per-node 4 {ALONE}"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "1234"},
            "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr host0 --master-port 1234",
        ),
        (
            {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_JOB_ID": "70042"},
            "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr n3 --master-port 29542",
        ),
        (  # a step of a part of its job
            {"SLURM_NNODES": "9", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[0-8]"}
            | {"SLURM_STEP_NODELIST": "n[3-4]"},
            "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr n3 --master-port 29500",
        ),
        ({"SLURM_NNODES": "9", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}, f"--nproc-per-node 2 {ALONE}"),
        ({"SLURM_NNODES": "1", "SLURM_NODEID": "0"}, f"--nproc-per-node 2 {ALONE}"),
        ({"LOG_DIR": "a b"}, f"--nproc-per-node 2 {ALONE} --log-dir a b/node_0 --tee 3"),
    ],
)
def test_bash_starts_torchrun_from_the_clusters_variables(
    launch: Launch, variables: dict[str, str], expected: str
) -> None:
    result = launch(**variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{ROOT / 'tools' / 'launch.py'} {expected} {TAIL}"


def test_every_recipe_is_launched_alike(launch: Launch) -> None:
    expected = launch().stdout.replace(SCRIPT.stem, PHI2.stem)
    assert launch(PHI2).stdout == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NNODES": "1", "SLURM_LOCALID": "3"}, "error: srun: expected --ntasks-per-node 1, this is task 3"),
        ({"NNODES": "2", "MAX_RESTARTS": "3"}, "error: MAX_RESTARTS: is for one node; on 2 start the same commands"),
        ({"NNODES": "2"}, "error: NODE_RANK: expected the number of this node"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "error: MASTER_ADDR: expected the address of node 0"),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}, "error: srun: expected --ntasks-per-node 1"),
    ],
)
def test_what_is_missing_for_several_nodes_is_named(launch: Launch, variables: dict[str, str], message: str) -> None:
    result = launch(**variables)
    assert result.returncode == 2
    assert message in result.stderr


def test_without_an_answer_of_scontrol_the_address_is_asked_for(launch: Launch, tmp_path: Path) -> None:
    slurms = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[7-8]"}
    asked = "error: MASTER_ADDR: expected the address of node 0, of 2, in the environment (export MASTER_ADDR=HOST): "
    result = launch(**slurms)  # which the stand-in does not know
    assert (result.returncode, result.stderr) == (2, f"{asked}scontrol does not tell the hosts of n[7-8]\n")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("bash", "dirname", "wc", "tr", "grep"):
        (alone / name).symlink_to(str(shutil.which(name)))
    put_stand_ins(alone, {"python": 'echo "$@"'})
    clean = environment(**slurms, PATH=str(alone))
    for address, status, told in ((None, 2, f"{asked}there is no scontrol here that tells it\n"), ("n7", 0, "")):
        env = clean if address is None else clean | {"MASTER_ADDR": address}
        result = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (status, told)


def test_slurm_starts_one_task_a_node_with_logs(tmp_path: Path) -> None:
    """What examples/slurm.sh hands to srun, and what each node's task makes of it; srun, scontrol and python are
    stand-ins."""
    stand_ins = {
        "srun": 'echo "srun $LOG_DIR:" "${@:1:3}"\nfor node in 0 1; do SLURM_NODEID=$node "${@:4}"; done',
        "scontrol": SHOWS_HOSTNAMES,
        "python": 'echo "$@"',
    }
    put_stand_ins(tmp_path, stand_ins)
    variables = {"SLURM_JOB_NAME": "extension", "SLURM_JOB_ID": "70042", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    env = environment(**variables, SLURM_JOB_NODELIST="n[3-4]", NPROC_PER_NODE="8")
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    slurm = ROOT / "examples" / "slurm.sh"
    command = ["bash", str(slurm), str(SCRIPT), "--lr", "1e-5", "a b"]
    started = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (started.returncode, started.stderr) == (0, "")
    logs = "extension-70042.logs"
    one, *tasks = started.stdout.splitlines()
    assert one == f"srun {logs}: --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none"
    assert tasks == [
        f"{ROOT / 'tools' / 'launch.py'} --nproc-per-node 8 --nnodes 2 --node-rank {node} --master-addr n3 "
        f"--master-port 29542 --log-dir {logs}/node_{node} --tee 3 {TAIL}"
        for node in (0, 1)
    ]
    given = [line.split()[1] for line in slurm.read_text().splitlines() if line.startswith("#SBATCH")]
    asked = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0"}
    assert asked | {"--signal=TERM@600", "--dependency=singleton", "--open-mode=append"} <= set(given)
