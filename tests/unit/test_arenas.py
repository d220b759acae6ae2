"""What a client runs when the last view of something is gone."""

from __future__ import annotations

import os

import pytest

from transfer_queue.client.arenas import Releaser


@pytest.mark.parametrize("pending", [False, True])
def test_holds_of_a_parent_end_nothing_in_its_forked_child(pending: bool) -> None:
    """Also one that ended just before the fork, which the parent sees to. What the child holds itself ends there."""
    ended: list[str] = []
    releaser = Releaser()
    holds = [releaser.hold(lambda: ended.append("parent"))]
    if pending:
        releaser.close()  # nobody looks at what is due until the next hold
        holds.clear()
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            own = releaser.hold(lambda: ended.append("child"))
            del own
            holds.clear()
            releaser.close()
            os.write(outlet, " ".join(ended).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(outlet)
    with os.fdopen(inlet) as said:
        assert said.read() == "child"
    assert ended == []
    holds.append(releaser.hold(lambda: ended.append("last")))
    holds.clear()
    releaser.close()
    assert sorted(ended) == ["last", "parent"]
