"""What a training run will need before its GPUs are booked: memory, FLOPs, communication and time of a step; or the
layout that suits it best. Runs on a CPU, opens no rows and no weights.

python tools/plan.py --config examples/extend_llama3_32k.yaml --model llama3-8b --world-size 8 --gpu h100
python tools/plan.py --config examples/extend_llama3_32k.yaml --model llama3-8b --world-size 64 --find-layout
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_tw.config import load_options, user_errors
from megatron_tw.config.plan import DOES_NOT_FIT, PlanConfig


def main(argv: Sequence[str]) -> int:
    """Parse, simulate, print, write. A user's mistake is one line on stderr and exit status 2."""
    config = load_options(argv, PlanConfig, prog="tools/plan.py", description="Plan a training run.")
    with user_errors():
        from megatron_tw.data.files import check_new_folder, new_folder
        from megatron_tw.planning.picture import memory_picture
        from megatron_tw.planning.run import layout_options, make_plan
        from megatron_tw.planning.table import format_plan

        output = config.plan.output
        if output is not None:
            check_new_folder(Path(output))
        planned = make_plan(config)
        print(format_plan(planned))
        if output is not None:
            with new_folder(Path(output)) as folder:
                (folder / "plan.json").write_text(json.dumps(planned.plan.to_json(), indent=1) + "\n", encoding="utf-8")
                (folder / "memory.png").write_bytes(memory_picture(planned.plan))
                if config.plan.find_layout:
                    layout = yaml.safe_dump(layout_options(planned.plan), sort_keys=False)
                    (folder / "layout.yaml").write_text(layout, encoding="utf-8")
            print(f"\nwritten to {output}: {', '.join(sorted(file.name for file in Path(output).iterdir()))}")
    return 0 if planned.plan.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
