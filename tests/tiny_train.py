"""train.py with the tests' preset, as a program of its own: for tests that kill it or start it several times.

python tests/tiny_train.py DIE_AT_STEP RANK train.py's flags        (DIE_AT_STEP 0: lives to the end)

DIE_AT_STEP -7: gets SIGTERM in step 7 instead of SIGKILL.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from conftest import set_tiny_preset

import train
from bridge_wsol.utils import one_line_errors

if __name__ == "__main__":
    set_tiny_preset(pytest.MonkeyPatch())
    die_at, rank, steps, whole = int(sys.argv[1]), sys.argv[2], [], train.TrainingStep.forward

    def forward(*args):
        steps.append(1)
        if len(steps) == abs(die_at) and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGKILL if die_at > 0 else signal.SIGTERM)
        return whole(*args)

    train.TrainingStep.forward = forward
    with one_line_errors():
        train.main(sys.argv[3:])
