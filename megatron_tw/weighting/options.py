"""From the options of a run to its weighting scheme."""

from dataclasses import fields, replace

from megatron_tw.config import WeightingOptions
from megatron_tw.weighting.config import PRESETS, Weighting, WeightingConfig
from megatron_tw.weighting.schedule import Stage, WeightingSchedule, parse_schedule

_OVERRIDES = {"comparison", "transforms", "truncation", "sparsification", "normalization", "interpolation"}
"""Steps of the pipeline, which any preset made of one can be given another setting of."""


def schedule_from_options(options: WeightingOptions) -> WeightingSchedule:
    """The run's scheme at every step: `--weighting-schedule`, or one scheme throughout.

    Raises:
        ValueError: a stage that cannot be read, or an option that its scheme does not have; names the option.
    """
    scheme = _scheme_from_options(options)
    if options.weighting_schedule is None:
        return WeightingSchedule((Stage(0, None, scheme),))
    return parse_schedule(options.weighting_schedule, base=scheme)


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
