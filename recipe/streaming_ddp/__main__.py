"""`python -m recipe.streaming_ddp`; `--help` lists the options and the exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipe.streaming_ddp import config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit status. Bad arguments raise SystemExit(2), a crash raises what it is (status 1)."""
    settings = config.parse(argv)
    from recipe.streaming_ddp import job  # brings torch, which a bad command line need not wait for

    return job.exit_status(settings)


if __name__ == "__main__":
    sys.exit(main())
