"""Kill training runs of every backend at random moments, full batch and mini-batch, and resume them.

    python -m tests.soak.kill_and_resume --kills 100

`tests.support.kills` describes the checks.
"""

import argparse

from kernels import backend_names
from tests.support.kills import Case, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills")
    options = parser.parse_args()
    cases = [Case(backend, batch_size) for backend in backend_names() for batch_size in (None, 7)]
    print("in all:", dict(run(cases, options.kills, options.seed)))


if __name__ == "__main__":
    main()
