"""``dit_models.train`` for torchrun: rank 1 is killed in its fifth step, at the first attempt."""

import os
import sys
from pathlib import Path

from dit_models.train import main

from .disturbed_runs import disturb, kill

if __name__ == "__main__":
    run_dir = next(word for word in sys.argv if word.startswith("run_dir="))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        disturb(Path(run_dir.removeprefix("run_dir=")), 5, (1,), kill)
    main()
