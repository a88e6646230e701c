"""From the options of a run to its weighting scheme."""

from dataclasses import fields, replace

from megatron_tw.config import WeightingOptions
from megatron_tw.weighting.config import PRESETS, ExactConfig, Weighting, WeightingConfig
from megatron_tw.weighting.schedule import Stage, WeightingSchedule, parse_schedule

_OVERRIDES = {"comparison", "transforms", "truncation", "sparsification", "normalization", "interpolation"}
"""Steps of the pipeline, which any preset made of one can be given another setting of."""


def schedule_from_options(options: WeightingOptions) -> WeightingSchedule:
    """The run's scheme at every step: `--weighting-schedule`, or one scheme throughout.

    Raises:
        ValueError: a stage that cannot be read, an option that its scheme does not have or that no stage uses, or
            weights that may be negative; names the option.
    """
    scheme = _scheme_from_options(options)
    if options.weighting_schedule is None:
        schedule = WeightingSchedule((Stage(0, None, scheme),))
    else:
        schedule = parse_schedule(options.weighting_schedule, base=scheme)
        if options != WeightingOptions(weighting_schedule=options.weighting_schedule) and not any(
            stage.scheme == scheme for stage in schedule.stages
        ):
            raise ValueError(f"--weighting-schedule: no stage is base, the scheme of --weighting {options.weighting}")
    for stage in schedule.stages:
        if isinstance(stage.scheme, WeightingConfig) and stage.scheme.may_be_negative:
            raise ValueError(
                f"--transforms: {' '.join(stage.scheme.transforms) or 'none'} leaves weights below 0, which teach the "
                "model to miss its targets; expected absolute, exp or max at the end, or --sparsification"
            )
    return schedule


def check_tail(schedule: WeightingSchedule, seq_length: int) -> None:
    """That rows of `seq_length` tokens have the long contexts which exact is to favour.

    Raises:
        ValueError: they have not.
    """
    for stage in schedule.stages:
        if isinstance(stage.scheme, ExactConfig) and stage.scheme.tau >= seq_length:
            raise ValueError(f"--tau: expected less than the {seq_length} tokens of a row, got {stage.scheme.tau:g}")


def _scheme_from_options(options: WeightingOptions) -> Weighting:
    """The preset that `--weighting` names with the other options in place of its own settings, or a custom pipeline
    of them alone.

    Raises:
        ValueError: unknown preset, a value out of range, or an option that the scheme does not have; names the option.
    """
    given = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in ("weighting", "weighting_schedule") and getattr(options, field.name) is not None
    }
    if options.weighting == "custom":
        if "shift" in given:
            raise ValueError(
                '--shift: a custom scheme says it in --transforms, for example --transforms minus "shift 2.0" max'
            )
        for name in ("alpha", "gamma", "tau"):
            if name in given:
                raise ValueError(f"--{name}: a custom scheme does not have this option")
        if not given:
            raise ValueError("--weighting custom: expected --transforms or other steps with it, got none")
        return WeightingConfig(**given)
    parameters = PRESETS[options.weighting].parameters if options.weighting in PRESETS else {}
    scheme = WeightingConfig.preset(options.weighting, **{name: given[name] for name in given if name in parameters})
    others = {name: value for name, value in given.items() if name not in parameters}
    pipeline = isinstance(scheme, WeightingConfig) and options.weighting != "uniform"
    for name in others:
        if not pipeline or name not in _OVERRIDES:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: --weighting {options.weighting} does not have this option")
    return replace(scheme, **others)
