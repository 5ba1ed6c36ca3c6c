"""One process of a team, for test_team_members.py: python team_member.py WHAT; process 1 fails, in the way of WHAT."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import distributed

from core.errors import DataError, OctetError
from training import link
from training.team import Team, _links, join_team

link.PATIENCE = 3.0


def work(team: Team, what: str) -> None:
    """Exchange something; process 1 fails; the others wait for it in an exchange, or at the store."""
    assert team.gather(team.rank * 10) == [0, 10]
    assert team.share(f"of {team.rank}") == "of 0"
    assert team.collect(team.rank) == ([0, 1] if team.first else [1])
    assert team.from_first(lambda: team.rank) == 0
    if what == "busy watch":
        _links[0].watch._look = lambda: keep_busy(_links[0].watch.store)  # type: ignore[method-assign]
        time.sleep(1.2)
        _links[0].watch.end()
        assert not _links[0].watch.is_alive()
    if what.startswith("all"):
        raise DataError("the same in all")
    if team.rank == 1:
        print("pid", os.getpid(), flush=True)
        if what == "kill once" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            what = "fine"
        if what == "raise":
            raise DataError("image 7 is missing")
        if what not in ("fine", "busy watch"):
            os.kill(os.getpid(), signal.SIGSTOP if what.startswith("stop") else signal.SIGKILL)
    if what.endswith("exchange"):
        distributed.all_reduce(torch.ones(3))
    team.wait()


def keep_busy(store: distributed.Store) -> None:
    """A second at the store."""
    with suppress(RuntimeError):
        store.wait(["nothing"], timedelta(seconds=1))


def main() -> None:
    team = join_team()
    try:
        with team.reporting():
            work(team, sys.argv[1])
    except OctetError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print("done")


if __name__ == "__main__":
    main()
