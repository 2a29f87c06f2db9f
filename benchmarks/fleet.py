"""A fleet of replicas, simulated: how often a session is where its request goes, what moving it costs, and who waits.

    python benchmarks/fleet.py --measure costs.json          # on the machine and model that a replica would have
    python benchmarks/fleet.py --costs costs.json --replicas 1000 --sessions 100000 --minutes 15

Sessions differ in how busy they are (a heavy tail), and come in bursts. A request goes to the replica of its session,
as consistent hashing has it; a replica that fails is gone for a while, and its sessions are resumed by others. Each
replica keeps so many sessions open, the least recently used go. It does the work before first tokens (resuming, reading
what is new) in order of arrival; decoding gives way to that, as the scheduler has it, and takes no part here.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What a replica takes for its work.

    Attributes:
        resume_s: seconds to open a session that is not open, until its first chunk can go in.
        resume_bytes: read for that.
        turn_s: seconds of a turn beside reading: routing, matching the history, committing.
        tok_s: tokens read in a second.
    """

    resume_s: float = 0.15
    resume_bytes: int = 25_000_000
    turn_s: float = 0.1
    tok_s: float = 300.0


def measure(model: str, tokens: int) -> Costs:
    """The costs on this machine, of a session of so many tokens."""
    from infllm_agent import AgentRuntime

    with tempfile.TemporaryDirectory() as root, AgentRuntime.open(root, model) as runtime:
        line = "12:03 host db-3 disk at 91 %, 404 of 1200 requests failed, retry in 5 s\n"
        session, began = runtime.session("measured"), time.perf_counter()
        while session.token_count < tokens:
            session.append_observation(line * 20)
        reading, read = time.perf_counter() - began, session.memory.length
        session.append_user("Which host?")
        session.reply(max_tokens=1)
        session.commit()
        began = time.perf_counter()
        session.append_user("And now?")
        session.reply(max_tokens=1)
        session.commit()
        turn, new = time.perf_counter() - began, session.last_reply.usage.prefilled_tokens
        tail = sum(path.stat().st_size for path in session.store.folder.glob("tail-*"))
        runtime.release("measured")
        began = time.perf_counter()
        runtime.session("measured")
        resume = time.perf_counter() - began
    tok_s = read / reading
    return Costs(round(resume, 4), tail, round(max(0.0, turn - new / tok_s), 4), round(tok_s, 1))


@dataclass
class Replica:
    """One replica: when it is done with what it was given, and what it has open."""

    free: float
    down_until: float
    opened: OrderedDict[int, None]


def simulate(
    costs: Costs,
    *,
    replicas: int,
    sessions: int,
    minutes: float,
    gap_s: float,
    new_tokens: float,
    kept: int,
    failures_a_day: float,
    down_s: float,
    seed: int,
) -> dict[str, Any]:
    """Figures of a run; times are those of first tokens.

    Args:
        gap_s: mean seconds between requests of a session.
        new_tokens: mean tokens that a request brings.
        kept: sessions that a replica keeps open.
        failures_a_day: of each replica.
        down_s: seconds until a failed replica is back.
    """
    random = np.random.default_rng(seed)
    # How busy: lognormal, so that a tenth of the sessions makes half of the requests.
    gaps = gap_s * random.lognormal(0, 1.2, sessions)
    gaps *= gap_s * np.mean(1 / gaps)  # the mean rate is as asked
    homes = random.integers(0, replicas, size=(sessions, 3))  # the replica of a session, and who comes after it
    fleet = [Replica(0.0, 0.0, OrderedDict()) for _ in range(replicas)]
    end = minutes * 60
    coming = [(float(at), session) for session, at in enumerate(random.exponential(gaps)) if at < end]
    heapq.heapify(coming)
    failing = np.sort(random.uniform(0, end, random.poisson(failures_a_day * replicas * end / 86400)))
    failed = iter([*zip(failing, random.integers(0, replicas, len(failing)), strict=True), (np.inf, 0)])
    next_failure = next(failed)
    waits: list[float] = []
    hits = affine = resumes = 0
    last = np.full(sessions, -1)
    while coming:
        now, session = heapq.heappop(coming)
        while next_failure[0] <= now:
            broken = fleet[next_failure[1]]
            broken.opened.clear()
            broken.free = broken.down_until = next_failure[0] + down_s
            next_failure = next(failed)
        place = next((int(home) for home in homes[session] if fleet[home].down_until <= now), int(homes[session][0]))
        replica = fleet[place]
        known = session in replica.opened
        first_time = last[session] < 0
        work = costs.turn_s + random.exponential(new_tokens) / costs.tok_s
        if known:
            hits += 1
        elif not first_time:
            resumes += 1
            work += costs.resume_s
            if last[session] != place:  # whoever has it gives it back
                fleet[last[session]].opened.pop(session, None)
        affine += first_time or last[session] == place
        last[session] = place
        replica.opened[session] = None
        replica.opened.move_to_end(session)
        if len(replica.opened) > kept:
            replica.opened.popitem(last=False)
        begins = max(now, replica.free)
        replica.free = begins + work
        waits.append(replica.free - now)
        # Bursts: mostly the next turn follows soon, now and then after long.
        pause = gaps[session] * (random.exponential(0.2) if random.random() < 0.8 else random.exponential(4.2))
        if (later := replica.free + pause) < end:
            heapq.heappush(coming, (later, session))
    times = np.array(waits)
    requests = len(times)
    return {
        "requests": requests,
        "requests_s": round(requests / end, 1),
        "affinity": round(affine / requests, 4),
        "open_already": round(hits / max(1, hits + resumes), 4),
        "resumes_s": round(resumes / end, 2),
        "resume_mb_s": round(resumes * costs.resume_bytes / end / 1e6, 2),
        "load": round((costs.turn_s + new_tokens / costs.tok_s) * requests / end / replicas, 3),
        "failures": len(failing),
        "first_token_s": {f"p{q}": round(float(np.percentile(times, q)), 3) for q in (50, 95, 99, 99.9)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure the costs here, and write them")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192, help="of the session that is measured")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="costs that were measured")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--gap-s", type=float, default=600)
    parser.add_argument("--new-tokens", type=float, default=100)
    parser.add_argument("--kept", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--failures-a-day", type=float, default=6)
    parser.add_argument("--down-s", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.measure:
        costs = measure(given.model, given.tokens)
        given.measure.write_text(json.dumps(asdict(costs)))
        print(json.dumps(asdict(costs)))
        return
    costs = Costs(**json.loads(given.costs.read_text())) if given.costs else Costs()
    for kept in given.kept:
        found = simulate(
            costs,
            replicas=given.replicas,
            sessions=given.sessions,
            minutes=given.minutes,
            gap_s=given.gap_s,
            new_tokens=given.new_tokens,
            kept=kept,
            failures_a_day=given.failures_a_day,
            down_s=given.down_s,
            seed=given.seed,
        )
        print(json.dumps({"kept": kept} | found))


if __name__ == "__main__":
    main()
