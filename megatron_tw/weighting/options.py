"""From the options of a run to its weighting scheme."""

from dataclasses import fields, replace

from megatron_tw.config import WeightingOptions
from megatron_tw.weighting.config import PRESETS, ExactConfig, Weighting, WeightingConfig


def weighting_from_options(options: WeightingOptions) -> Weighting:
    """The preset that `--weighting` names with the other options in place of its own settings, or a custom pipeline
    of them alone.

    Raises:
        ValueError: unknown preset, a value out of range, or an option that the scheme does not have; names the option.
    """
    given = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name != "weighting" and getattr(options, field.name) is not None
    }
    if options.weighting == "custom":
        if "shift" in given:
            raise ValueError(
                '--shift: a custom scheme says it in --transforms, for example --transforms minus "shift 2.0" max'
            )
        return WeightingConfig(**given)
    parameters = PRESETS[options.weighting].parameters if options.weighting in PRESETS else {}
    scheme = WeightingConfig.preset(options.weighting, **{name: given[name] for name in given if name in parameters})
    others = {name: value for name, value in given.items() if name not in parameters}
    if not others:
        return scheme
    if isinstance(scheme, ExactConfig) or options.weighting == "uniform" or "shift" in others:
        name = next(iter(others)).replace("_", "-")
        raise ValueError(f"--{name}: --weighting {options.weighting} does not have this option")
    return replace(scheme, **others)
