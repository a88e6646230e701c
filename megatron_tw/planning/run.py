"""From the options of tools/plan.py to plans: the ranks of one layout simulated, or a search whose finalists are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_tw.config import RunConfig, check_model_shape, num_microbatches
from megatron_tw.config.plan import PlanConfig, check_plan
from megatron_tw.data.progress import Progress
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.planning.calibration import calibrated
from megatron_tw.planning.limits import NOT_SIMULATED
from megatron_tw.planning.plan import Plan, takes_transformer_engine
from megatron_tw.planning.processes import simulate_all
from megatron_tw.planning.record import Simulation
from megatron_tw.planning.roofline import Cluster
from megatron_tw.planning.search import Candidate, best_of_each, candidates
from megatron_tw.planning.shapes import named_architecture
from megatron_tw.planning.simulate import Job, ranks_to_simulate
from megatron_tw.planning.sizes import Sizes
from megatron_tw.training.scorers import check_scorer_options
from megatron_tw.weighting.options import schedule_from_options

ROUNDS = 3
"""Of finalists, where none of those before them fits."""
Simulator = Callable[[Sequence[Job], int], list[Simulation]]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """plan: of the layout asked for, or the best one found. others: of the other finalists that were simulated.
    candidates: that the search ranked by formula; empty without one."""

    plan: Plan
    others: tuple[Plan, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def make_plan(config: PlanConfig) -> Planned:
    """What the options ask for.

    Raises:
        ValueError: options that do not fit each other, the model or the GPUs; names the option.
    """
    check_plan(config)
    run, options = config.run_config(), config.plan
    architecture = _architecture(config)
    scorer = None if run.scorer.scorer_hf is None else _read("--scorer-hf", run.scorer.scorer_hf)
    cluster = Cluster.of(options, transformer_engine=takes_transformer_engine(run))
    schedule = schedule_from_options(run.weighting)
    check_scorer_options(run, needed=schedule.needs_scorer)
    schedule.check_rows(run.data.seq_length)
    if config.train.train_iters is None:
        run = replace(run, train=replace(run.train, train_iters=schedule.stages[-1].step + 1))
    architecture.check_length(run.data.seq_length, "--seq-length")
    if options.calibrate is not None:
        cluster = calibrated(cluster, options.calibrate, transformer_engine=takes_transformer_engine(run))
    if options.find_layout:
        return _search(config, run, architecture, scorer, cluster)
    check_model_shape(
        run.parallel,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
    )
    num_microbatches(run.train, run.parallel, options.world_size)
    sizes = Sizes.of(run, architecture, options.world_size, scorer)
    (plan,) = _plans([sizes], scorer, cluster, options.processes)
    return Planned(plan=plan)


def _search(
    config: PlanConfig, run: RunConfig, architecture: Architecture, scorer: Architecture | None, cluster: Cluster
) -> Planned:
    """The fastest layout that fits when it is simulated."""
    fixed = sum(allowance.bytes for allowance in NOT_SIMULATED)
    share = sum(allowance.share for allowance in NOT_SIMULATED)
    ranked = candidates(run, architecture, cluster, scorer=scorer, fixed=fixed, share=share)
    simulated: list[Plan] = []
    best, count = best_of_each(ranked, cluster), config.plan.finalists
    for start in range(0, min(len(best), ROUNDS * count), count):
        finalists = [finalist.sizes for finalist in best[start : start + count]]
        simulated += _plans(finalists, scorer, cluster, config.plan.processes)
        if any(plan.fits for plan in simulated):
            break
    simulated.sort(key=lambda plan: (not plan.fits, plan.step_seconds if plan.fits else plan.needed_bytes))
    return Planned(plan=simulated[0], others=tuple(simulated[1:]), candidates=tuple(ranked))


def _plans(layouts: Sequence[Sizes], scorer: Architecture | None, cluster: Cluster, processes: int) -> list[Plan]:
    """Plans of these layouts, whose ranks are simulated side by side."""
    jobs = [
        Job(
            config=sizes.config,
            architecture=sizes.architecture,
            world_size=sizes.world_size,
            rank=rank,
            scorer_architecture=scorer,
        )
        for sizes in layouts
        for rank in ranks_to_simulate(sizes.config, sizes.architecture, sizes.world_size)
    ]
    with Progress("simulating", len(jobs), "ranks", show=True, keep=False) as progress:
        results = simulate_all(jobs, processes=processes, progress=lambda done, of: progress.update())
    plans = []
    for sizes in layouts:
        of_layout = [result for job, result in zip(jobs, results, strict=True) if job.config is sizes.config]
        plans.append(Plan.of(sizes, cluster, of_layout, _allowances(of_layout)))
    return plans


def _allowances(simulations: Sequence[Simulation]) -> dict[str, int]:
    """Bytes of the fullest rank that no simulation sees, by name; 0 for what is unknown."""
    peak = max(simulation.peak.total for simulation in simulations)
    return {allowance.name: allowance.bytes + round(allowance.share * peak) for allowance in NOT_SIMULATED}


def _architecture(config: PlanConfig) -> Architecture:
    if config.plan.model is not None:
        return named_architecture(config.plan.model)
    assert config.model.load_hf is not None
    return _read("--load-hf", config.model.load_hf)


def _read(option: str, folder: str) -> Architecture:
    try:
        return read_architecture(folder)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def layout_options(plan: Plan) -> dict[str, object]:
    """The options that the search chose, for a YAML file behind the recipe's."""
    config = plan.config
    groups = (config.parallel, config.data_parallel, config.activations)
    chosen: dict[str, object] = {name: value for group in groups for name, value in vars(group).items()}
    for name in ("distributed_timeout_minutes", "sequence_parallel", "cp_comm_type", "loss_keep_logits_mib"):
        del chosen[name]
    del chosen["hierarchical_context_parallel_sizes"]
    chosen["micro_batch_size"] = config.train.micro_batch_size
    chosen["scoring_micro_batch"] = config.windows.scoring_micro_batch
    return chosen
