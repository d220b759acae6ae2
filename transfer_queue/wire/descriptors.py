"""Room for many connections: a server needs a descriptor for each."""

from __future__ import annotations

import contextlib
import resource


def raise_descriptor_limit() -> int:
    """Raise the soft limit of this process to its hard limit; return what it is now.

    For processes that belong to a server alone. In a user's own process nothing is changed: 2 000 clients need some
    2 100 descriptors in the controller, and the soft limit is often 1 024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems forbid what they say is allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
