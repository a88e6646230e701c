"""A plan as text, at most 120 columns wide."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_tw.config import ParallelConfig
from megatron_tw.planning.formulas import training_bytes
from megatron_tw.planning.limits import NOT_SIMULATED
from megatron_tw.planning.plan import Plan, layout_in_words, takes_transformer_engine
from megatron_tw.planning.record import CATEGORIES, PHASES
from megatron_tw.planning.roofline import PhaseTime, collective_seconds, members_in_node
from megatron_tw.planning.run import Planned
from megatron_tw.planning.search import estimated_seconds, gather_choices
from megatron_tw.planning.transformer_engine import STATUS, unpaired

GIGA, MEGA = 1e9, 1e6
SHOWN_CANDIDATES = 8
WIDTH = 120
LONGEST_WORD, LONGEST_NAME = 30, 90


def format_plan(planned: Planned) -> str:
    """The search, where there was one, and the plan."""
    plan = planned.plan
    parts = [_heading(plan)]
    if planned.candidates:
        parts.append(_search(planned))
    parts += [_memory(plan), _not_simulated(plan), _verdict(plan), _times(plan), _collectives(plan)]
    parts += [_gathers(plan), _transformer_engine(plan), _notes(plan)]
    lines = "\n\n".join(part for part in parts if part).splitlines()
    return "\n".join(line if len(line) <= WIDTH else textwrap.fill(line, WIDTH) for line in lines)


def _heading(plan: Plan) -> str:
    sizes, gpu = plan.sizes, plan.cluster.gpu
    config = sizes.config
    rows = f"{sizes.rows} rows a step, {sizes.microbatches} micro-batches a replica"
    return (
        f"{'/'.join(sizes.architecture.source.split('/')[-3:-1])}, rows of {config.data.seq_length:,} tokens, {rows}\n"
        f"{sizes.world_size} x {gpu.kind.upper()}, {plan.cluster.gpus_per_node} a node: {layout_in_words(sizes)}"
    )


def _search(planned: Planned) -> str:
    finalists = {plan.sizes.config.parallel: plan for plan in (planned.plan, *planned.others)}
    rows: list[list[str]] = []
    seen: set[ParallelConfig] = set()
    for candidate in planned.candidates:
        if candidate.axes in seen or (len(seen) >= SHOWN_CANDIDATES and candidate.axes not in finalists):
            continue
        seen.add(candidate.axes)
        plan = finalists.get(candidate.axes)
        sizes = plan.sizes if plan is not None else candidate.sizes
        simulated = ["", ""]
        if plan is not None:
            simulated = [f"{plan.step_seconds:.1f}", f"{plan.needed_bytes / GIGA:.1f}{'' if plan.fits else ' no'}"]
        mark = "*" if plan is planned.plan else ""
        words = layout_in_words(sizes)
        rows.append([mark, words, f"{candidate.seconds:.1f}", f"{candidate.bytes / GIGA:.1f}", *simulated])
    title = (
        f"Layouts: {len(planned.candidates)} fit by formula or may; seconds of a step and GB of a GPU, by formula and "
        "simulated"
    )
    return title + "\n" + _table(["", "layout", "s", "GB", "sim. s", "sim. GB"], rows)


def _memory(plan: Plan) -> str:
    rows = []
    for simulation in plan.simulations:
        for phase in PHASES:
            moment = simulation.peak_by_phase.get(phase)
            if moment is None:
                continue
            parts = [f"{moment.bytes_by_category.get(category, 0) / GIGA:.1f}" for category in CATEGORIES]
            place = f"{simulation.rank}: {simulation.place}" if phase == PHASES[0] else ""
            mark = " <" if phase == simulation.peak.phase else ""
            rows.append([place, phase, *parts, f"{moment.total / GIGA:.1f}{mark}"])
    return "Memory at the peak of each phase, GB (simulated)\n" + _table(["rank", "phase", *CATEGORIES, "all"], rows)


def _not_simulated(plan: Plan) -> str:
    rows = [
        [allowance.name, f"{plan.allowances[allowance.name] / GIGA:.1f}", allowance.why] for allowance in NOT_SIMULATED
    ]
    return "Not simulated, and what is set aside for it, GB\n" + _table(["", "GB", ""], rows)


def _verdict(plan: Plan) -> str:
    needed, there = plan.needed_bytes / GIGA, plan.cluster.gpu.memory_bytes / GIGA
    if plan.fits:
        return f"fits: {needed:.1f} of {there:.1f} GB"
    return f"DOES NOT FIT: needs {needed:.1f} GB of {there:.1f}; the largest part: {plan.too_large}"


def _times(plan: Plan) -> str:
    simulation = plan.fullest
    columns = list(vars(PhaseTime()))
    rows = []
    for phase, time in plan.times.items():
        flops = sum(simulation.flops.get(phase, {}).values())
        rows.append(
            [phase, f"{flops / 1e12:,.1f}", *(_seconds(getattr(time, name)) for name in columns), _seconds(time.total)]
        )
    total = sum(sum(kinds.values()) for kinds in simulation.flops.values())
    sums = [sum(getattr(time, name) for time in plan.times.values()) for name in columns]
    rows.append(["step", f"{total / 1e12:,.1f}", *map(_seconds, sums), _seconds(plan.step_seconds)])
    scoring = f"scoring adds {plan.scoring_percent:.1f}%" if plan.times["scoring"].total else "no scoring pass"
    basis = "an estimate, nothing was measured"
    if plan.cluster.step_scale != 1.0 or plan.cluster.scoring_scale != 1.0:
        basis = f"scaled to a run: scoring x {plan.cluster.scoring_scale:.2f}, else x {plan.cluster.step_scale:.2f}"
    return (
        f"Time of a step by roofline, seconds on the slowest simulated rank ({basis})\n"
        + _table(["phase", "TFLOP", *columns, "all"], rows)
        + f"\n{plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, model FLOPs utilization "
        f"{100 * plan.utilization:.1f}% ({plan.utilization * plan.cluster.gpu.peak_flops / 1e12:.0f} TFLOP/s a GPU); "
        f"{scoring}"
    )


def _collectives(plan: Plan) -> str:
    simulation, parallel = plan.fullest, plan.config.parallel
    found: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for collective in simulation.collectives:
        if collective.group_size < 2:
            continue
        entry = found[collective.phase, collective.group, collective.group_size]
        entry[0] += collective.count
        entry[1] += collective.payload_bytes
        entry[2] += collective_seconds(collective, parallel, plan.cluster)
    if not found:
        return ""
    rows = []
    for (phase, group, size), (count, payload, seconds) in sorted(
        found.items(), key=lambda item: (PHASES.index(item[0][0]), item[0][1])
    ):
        inside = members_in_node(group, parallel, plan.cluster, size)
        link = "NVLink" if inside == size else f"network, {inside} of it a node"
        rows.append([phase, group, str(size), f"{count:,.0f}", f"{payload / GIGA:,.2f}", _seconds(seconds), link])
    return "Collectives of a step, GB of whole tensors\n" + _table(
        ["phase", "group", "ranks", "calls", "GB", "seconds", "over"], rows
    )


def _gathers(plan: Plan) -> str:
    """What becomes of the keys and values that context-parallel ranks gather, each choice by formula."""
    sizes = plan.sizes
    rows = []
    for name, choice in gather_choices(sizes).items():
        mark = "*" if choice.config.activations == sizes.config.activations else ""
        seconds = estimated_seconds(choice, plan.cluster)
        rows.append([mark, name, f"{training_bytes(choice) / GIGA:.1f}", f"{seconds:.1f}"])
    if not rows:
        return ""
    title = "Keys and values of other CP ranks, with this project's layers, by formula: GB of activations, s of a step"
    return f"{title}\n" + _table(["", "", "GB", "s"], rows)


def _transformer_engine(plan: Plan) -> str:
    rows = plan.te_differences
    if not rows:
        return ""
    ours, theirs = (sum(sum(getattr(row, side).values()) for row in rows) for side in ("simulated", "read"))
    left = unpaired(rows)
    pairs = sum(len(row.read) for row in rows) - sum(1 for tensor in left if tensor.read)
    shown = [
        [_short(tensor.name), *(f"{size / MEGA:.2f}" if size else "" for size in (tensor.simulated, tensor.read))]
        for tensor in left
    ]
    shown.append(
        [
            f"{pairs} more tensors have the same sizes in both; all of them",
            *(f"{size / MEGA:.2f}" for size in (ours, theirs)),
        ]
    )
    return f"What one layer saves, MB: simulated; Transformer Engine's, {STATUS}\n" + _table(
        ["tensor", "simulated", "read"], shown
    )


def _short(name: str) -> str:
    """Without the ends of long words, nor of a long name."""
    words = [word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 3]}..." for word in name.split(" ")]
    text = " ".join(words)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def _notes(plan: Plan) -> str:
    layers = plan.simulations[0].layers
    whose = "Transformer Engine's attention" if takes_transformer_engine(plan.config) else "PyTorch's flash attention"
    seconds = sum(simulation.seconds for simulation in plan.simulations)
    return (
        f"simulated: {layers}; not run: Transformer Engine's, which by formula would keep "
        f"{plan.te_saves_bytes / GIGA:.1f} GB less of the activations\n"
        f"rates of attention: {whose}; simulated in {seconds:.0f} s"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 or value == 0 else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers to the right, of words to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numbers = [
        all(not line[column] or line[column][0].isdigit() for line in lines[1:]) and ":" not in lines[1][column]
        for column in range(len(head))
    ]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )
