"""A run in Weights & Biases (--wandb-project), online or offline, on rank 0. The package is imported only here."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from megatron_tw.config import RunConfig

ID_FILE = "wandb_run_id"
"""Under --save: a resumed run goes on in the same run there."""


def check_wandb(config: RunConfig) -> None:
    """Raises ValueError where --wandb-project asks for a package that is not installed."""
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb-project: expected the package wandb, found none; pip install wandb")


def open_wandb(config: RunConfig) -> Any:
    """The run that --wandb-project asks for; None without.

    Steps are logged under an axis `iteration` of their own: W&B's own counter cannot go back, as a resumed run may.

    Raises:
        ValueError: it cannot be begun: nobody is logged in, or the network does not answer.
    """
    options = config.logging
    if options.wandb_project is None:
        return None
    import wandb

    save = Path(config.checkpoint.save) if config.checkpoint.save is not None else None
    folder = Path(options.wandb_save_dir) if options.wandb_save_dir is not None else save
    known = save / ID_FILE if save is not None else None
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=options.wandb_project,
            entity=options.wandb_entity,
            name=options.wandb_exp_name,
            dir=folder,
            id=(known.read_text().strip() or None) if known is not None and known.is_file() else None,
            resume="allow",
            config=dataclasses.asdict(config),
            settings=wandb.Settings(console="off"),
        )
        if known is not None:
            known.write_text(run.id)
    except (wandb.errors.Error, OSError) as error:
        mode = os.environ.get("WANDB_MODE")
        raise ValueError(
            f"--wandb-project {options.wandb_project}: {' '.join(str(error).split())}"
            + ("" if mode else "; with WANDB_MODE=offline in the environment nothing is sent")
        ) from error
    run.define_metric("*", step_metric="iteration")
    return run


def is_offline(run: Any) -> bool:
    """Whether what is sent to a run stays in files until `wandb sync`."""
    return run.settings.mode in ("offline", "dryrun")  # the older word
