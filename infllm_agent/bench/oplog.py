"""A seeded operations log: days of an agent's session, with facts planted where people and tools say such things.

``generate`` mixes shell output, HTTP responses, JSON payloads, stack traces, alerts and short dialogue, drawn from
templates and vocabularies by a seeded generator. Every fact is stated twice in neighbouring messages, as it happens
in real sessions: an operator or a tool says it, the assistant confirms it. Its answer stands nowhere else in the log.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

Asked = Literal["before_restart", "after_restart"]

SYSTEM = (
    "You are the operations assistant of a small company. "
    "You read logs and answer questions about them in one sentence."
)
BEGIN = datetime(2026, 3, 2, 7, 58, 12)  # a Monday morning
#: The first tokens of a reply in which the answer has to appear.
ANSWER_TOKENS = 60


@dataclass(frozen=True)
class Event:
    """One message of the log. ``time`` is when it happened, as the text's own timestamps say it."""

    role: str
    text: str
    name: str | None
    time: datetime


@dataclass(frozen=True)
class Fact:
    """Something said once, to be asked about much later.

    Attributes:
        prefix: the words an answer is made to begin with; they do not contain the answer.
        messages: the indices of the events that state it, the first one first.
        place: how far into the log it is meant to be said, from 0 to 1.
    """

    question: str
    prefix: str
    answer: str
    messages: tuple[int, ...]
    place: float
    asked: Asked


@dataclass(frozen=True)
class OperationsLog:
    """Events in order, the system prompt first, and the facts in the order in which they are said."""

    events: Sequence[Event]
    facts: Sequence[Fact]
    tokens: int

    def asked(self, when: Asked) -> list[Fact]:
        return [fact for fact in self.facts if fact.asked == when]


def matches(reply: str, answer: str) -> bool:
    """Whether a reply (its first ``ANSWER_TOKENS`` tokens) gives the answer.

    The answer must appear in it, in any case, and not as a part of a longer word or number: 4821 is not 48213, nor is
    14821. Separators inside a number do not count: 48,213 is 48213.
    """
    if answer.isdigit():
        reply = re.sub(r"(?<=\d)[,\u202f\u00a0](?=\d)", "", reply)
    return re.search(rf"(?<![\w]){re.escape(answer)}(?![\w])", reply, re.IGNORECASE) is not None


def generate(seed: int, tokens: int, count_tokens: Callable[[Event], int]) -> OperationsLog:
    """A log of at least ``tokens`` tokens.

    Args:
        count_tokens: the size of an event as the session will count it.
    """
    writer = _Writer(random.Random(seed), count_tokens)
    writer.add("system", SYSTEM)
    for plan in sorted(_PLANS, key=lambda plan: plan.place):
        while writer.tokens < plan.place * tokens:
            writer.add_noise()
        writer.state(plan)
    while writer.tokens < tokens:
        writer.add_noise()
    return OperationsLog(writer.events, writer.facts, writer.tokens)


# -- facts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a fact is said. ``subject`` is what the question, the statement and the confirmation have in common."""

    place: float
    asked: Asked
    subject: str
    answers: Sequence[str] | int  # words to choose from, or the number of digits
    role: str
    name: str | None
    said: str
    confirmed: str


_PLANS = [
    _Plan(
        0.06,
        "before_restart",
        "mascot of the payments team",
        ["panda", "dolphin", "penguin", "leopard", "octopus", "tiger"],
        "user",
        None,
        "The votes are counted. "
        "Please keep this for later: the {subject} is the {answer}. I repeat, the {subject} is the {answer}.",
        "Noted. The {subject} is the {answer}.",
    ),
    _Plan(
        0.16,
        "after_restart",
        "codename of the warehouse migration",
        ["Phoenix", "Falcon", "Titan", "Orchid", "Raven", "Condor"],
        "user",
        None,
        "Short report from the planning call: the {subject} is {answer}. Use that name in all tickets.",
        "Understood. The {subject} is {answer}, and I will use it in all tickets.",
    ),
    _Plan(
        0.25,
        "before_restart",
        "owner of the search dashboard",
        ["Maria", "Oliver", "Sophie", "Victor", "Helena", "Martin"],
        "tool",
        "directory",
        "directory show dashboards/search\nThe {subject} is {answer}.\nAsk {answer} before any change.",
        "I looked it up: the {subject} is {answer}.",
    ),
    _Plan(
        0.38,
        "before_restart",
        "meeting point for the fire drill",
        ["cafeteria", "library", "garage", "garden", "stadium", "museum"],
        "tool",
        "runbook",
        "# Runbook: safety\n- The {subject} is the {answer}.\n- Leave by the stairs and wait at the {answer}.",
        "According to the runbook the {subject} is the {answer}.",
    ),
    _Plan(
        0.47,
        "after_restart",
        "colour of the emergency badge",
        ["purple", "orange", "silver", "yellow", "pink", "brown"],
        "user",
        None,
        "The badges are printed. The {subject} is {answer}. To be safe, once more: the {subject} is {answer}.",
        "Thank you. The {subject} is {answer}.",
    ),
    _Plan(
        0.56,
        "before_restart",
        "backup site of the billing database",
        ["Madrid", "Dublin", "Toronto", "Denver", "Tokyo", "Berlin"],
        "user",
        None,
        "Before I go off shift: the {subject} is {answer}. The old one is read-only now.",
        "Noted. The {subject} is {answer}, and restores will run in {answer}.",
    ),
    _Plan(
        0.74,
        "before_restart",
        "maker of the new storage array",
        ["Hitachi", "Toshiba", "Fujitsu", "Samsung", "Siemens", "Lenovo"],
        "observation",
        "mail",
        "From: purchasing\nSubject: your order\n\nThe offer is signed. The {subject} is {answer}.\n"
        "Delivery in three weeks.",
        "Purchasing has decided: the {subject} is {answer}. I will look for drivers by {answer}.",
    ),
    _Plan(
        0.90,
        "before_restart",
        "nickname of the new load balancer",
        ["Jupiter", "Saturn", "Neptune", "Venus", "Apollo", "Pluto"],
        "user",
        None,
        "It went live an hour ago. The {subject} is {answer}.",
        "Noted. The {subject} is {answer}. I will watch {answer} tonight.",
    ),
]


# -- everything else -----------------------------------------------------------------------------------------------

_SERVICES = [
    "payments",
    "search",
    "billing",
    "checkout",
    "inventory",
    "catalog",
    "sessions",
    "mailer",
    "invoices",
    "shipping",
    "auth",
    "gateway",
    "reports",
    "recommendations",
    "webhooks",
    "uploads",
    "thumbnails",
    "ledger",
    "audit",
    "profiles",
]
_HOSTS = [f"{kind}-{number:02d}" for kind in ("web", "db", "cache", "queue", "build", "edge") for number in range(1, 7)]
_VERBS = [
    "timed out",
    "was refused",
    "was reset by peer",
    "returned 503",
    "exceeded its deadline",
    "could not be resolved",
]
_PATHS = [
    "/api/v1/orders",
    "/api/v1/carts",
    "/healthz",
    "/metrics",
    "/api/v2/users",
    "/login",
    "/api/v1/stock",
    "/export",
    "/static/app.js",
]
_MOUNTS = ["/", "/boot", "/var", "/var/lib/docker", "/var/log", "/srv/data", "/home", "/mnt/backup", "/opt", "/tmp"]
_UNITS = [
    "nginx",
    "postgresql",
    "redis-server",
    "docker",
    "cron",
    "node-exporter",
    "fluent-bit",
    "chronyd",
    "haproxy",
    "rabbitmq-server",
]
_PEOPLE = ["Ada", "Bruno", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jonas"]
_ERRORS = [
    ("ConnectionError", "connection to {host}:5432 failed after {n} ms"),
    ("TimeoutError", "no answer from {service} within {n} ms"),
    ("KeyError", "'{service}_id'"),
    ("ValueError", "invalid literal for int() with base 10: '{host}'"),
    ("PermissionError", "[Errno 13] Permission denied: '/srv/data/{service}/{n}.tmp'"),
    ("MemoryError", "cannot allocate {n} pages for {service}"),
]
_FUNCTIONS = [
    "handle_request",
    "fetch_rows",
    "render_page",
    "acquire_lock",
    "publish_event",
    "load_config",
    "retry_call",
    "parse_body",
]
_JAVA = ["java.net.SocketTimeoutException", "java.lang.IllegalStateException", "java.sql.SQLTransientException"]
_CLASSES = [
    "OrderController",
    "StockRepository",
    "InvoiceJob",
    "SessionFilter",
    "PriceClient",
    "RetryTemplate",
    "PoolManager",
]
_TALK = [
    ("Is {service} healthy on {host}?", "Yes. {service} on {host} answers in {n} ms and shows no errors."),
    (
        "Why was {host} slow in the {part}?",
        "The load on {host} was {load}; most of it was {service} writing to /var/log.",
    ),
    ("Please restart {service} on {host}.", "Done. {service} on {host} came back after {small} seconds."),
    ("How full is the disk of {host}?", "{host} uses {percent}% of {mount}; at this rate it lasts {small} more days."),
    ("Did the nightly job for {service} run?", "It ran for {small} minutes and wrote {n} rows; nothing failed."),
    ("{person} says that {service} drops requests.", "I see {small} dropped requests on {host}, all on {path}."),
    ("Can we drain {host} today?", "Yes, {host} has {small} open connections; {service} moves to {other} first."),
    ("What changed in {service} since yesterday?", "One deploy by {person}: version {version}, {small} commits."),
    ("Who looks after {service} today?", "{person} took the {part} shift and acknowledged {small} alerts."),
    ("Silence the alert about {path} for an hour.", "The alert for {path} on {host} is silent until {clock}."),
]
_ALERTS = [
    "FIRING {service}: p99 latency {n} ms on {path}, threshold 800 ms",
    "RESOLVED {service}: error rate back to 0.{small}% after {small} minutes",
    "FIRING {host}: {mount} is {percent}% full",
    "WARNING {service}: replica lag {small} s behind {host}",
    "FIRING {host}: unit {unit} restarted {small} times",
    "INFO certificate for {service}.internal renews in {small} days",
]
_LOG_LINES = [
    "INFO {service} request {id} {path} took {n} ms",
    "WARN {service} connection to {host} {verb}, attempt {small}",
    "ERROR {service} job {id} {verb}",
    "INFO {host} {unit} reloaded the upstreams of {service}",
    "DEBUG {service} cache miss for key {service}:{id}",
    "INFO deploy of {service} {version} finished on {host}",
    "WARN {service} clock of {host} is {small} ms ahead of its peers",
    "INFO {service} operator {person} logged in to {host} from 10.{small}.{percent}.7",
]


class _Writer:
    """Writes events one after another, with a clock that moves on and answers that are kept out of the rest."""

    def __init__(self, rng: random.Random, count_tokens: Callable[[Event], int]) -> None:
        self.rng = rng
        self.clock = BEGIN
        self.events: list[Event] = []
        self.facts: list[Fact] = []
        self.tokens = 0
        self._count = count_tokens
        self._answers = {plan.subject: self._draw_answer(plan) for plan in _PLANS}
        self._kinds: list[tuple[Callable[[], list[tuple[str, str, str | None]]], int]] = [
            (self._dialogue, 6),
            (self._alert, 3),
            (self._grep, 4),
            (self._disks, 2),
            (self._unit_status, 2),
            (self._pods, 3),
            (self._processes, 2),
            (self._http, 3),
            (self._metrics, 2),
            (self._python_trace, 2),
            (self._java_trace, 2),
            (self._commits, 1),
            (self._query, 2),
        ]

    def add(self, role: str, text: str, name: str | None = None) -> int:
        """Append an event; returns its index."""
        event = Event(role, text, name, self.clock)
        self.events.append(event)
        self.tokens += self._count(event)
        return len(self.events) - 1

    def state(self, plan: _Plan) -> None:
        """Append the events that state a fact."""
        answer = self._answers[plan.subject]
        words = {"subject": plan.subject, "answer": answer}
        said = self.add(plan.role, plan.said.format(**words), plan.name)
        self._pass_time(20)
        confirmed = self.add("assistant", plan.confirmed.format(**words))
        self._pass_time(600)
        self.facts.append(
            Fact(
                question=f"What is the {plan.subject}?",
                prefix=f"The {plan.subject} is",
                answer=answer,
                messages=(said, confirmed),
                place=plan.place,
                asked=plan.asked,
            )
        )

    def add_noise(self) -> None:
        """Append what one thing that happens produces, drawn again if it happens to hold an answer."""
        kinds, weights = zip(*self._kinds, strict=True)
        while True:
            messages = self.rng.choices(kinds, weights)[0]()
            if not any(answer in text for answer in self._answers.values() for _, text, _ in messages):
                break
        for role, text, name in messages:
            self.add(role, text, name)
            self._pass_time(40)
        self._pass_time(2400)

    def _draw_answer(self, plan: _Plan) -> str:
        if isinstance(plan.answers, int):
            digits = self.rng.sample("123456789", plan.answers)  # all different: harder to guess from a part
            return "".join(digits)
        return self.rng.choice(plan.answers)

    def _pass_time(self, most: int) -> None:
        self.clock += timedelta(seconds=self.rng.randint(1, most))

    def _fill(self, template: str, service: str | None = None) -> str:
        """A template with freshly drawn values."""
        rng = self.rng
        return template.format(
            service=service or rng.choice(_SERVICES),
            host=rng.choice(_HOSTS),
            other=rng.choice(_HOSTS),
            unit=rng.choice(_UNITS),
            path=rng.choice(_PATHS),
            mount=rng.choice(_MOUNTS),
            verb=rng.choice(_VERBS),
            person=rng.choice(_PEOPLE),
            part=rng.choice(["morning", "afternoon", "evening", "night"]),
            id=f"{rng.getrandbits(24):06x}",
            n=rng.randint(11, 999),
            small=rng.randint(2, 59),
            percent=rng.randint(31, 98),
            load=f"{rng.uniform(0.4, 19):.2f}",
            version=f"{rng.randint(1, 9)}.{rng.randint(0, 30)}.{rng.randint(0, 12)}",
            clock=f"{(self.clock + timedelta(hours=1)):%H:%M}",
        )

    def _prompt(self, command: str) -> str:
        return f"[{self.clock:%a %d %b %H:%M:%S}] {self.rng.choice(_HOSTS)} $ {command}\n"

    def _dialogue(self) -> list[tuple[str, str, str | None]]:
        question, answer = self.rng.choice(_TALK)
        # One set of values for both, so that the answer is about what was asked.
        asked, answered = self._fill(f"{question}\0{answer}").split("\0")
        return [("user", asked, None), ("assistant", answered, None)]

    def _alert(self) -> list[tuple[str, str, str | None]]:
        lines = [
            f"{self.clock - timedelta(seconds=self.rng.randint(0, 90)):%H:%M:%S} {self._fill(self.rng.choice(_ALERTS))}"
            for _ in range(self.rng.randint(1, 4))
        ]
        return [("observation", "\n".join(lines), "alerts")]

    def _grep(self) -> list[tuple[str, str, str | None]]:
        service = self.rng.choice(_SERVICES)
        moment = self.clock - timedelta(minutes=self.rng.randint(1, 30))
        lines = []
        for _ in range(self.rng.randint(4, 10)):
            moment += timedelta(seconds=self.rng.randint(0, 40))
            lines.append(f"{moment:%H:%M:%S} {self._fill(self.rng.choice(_LOG_LINES), service)}")
        return [("tool", self._prompt(f"grep -h {service} /var/log/app.log") + "\n".join(lines), "shell")]

    def _disks(self) -> list[tuple[str, str, str | None]]:
        rows = ["Filesystem      Size  Used Avail Use% Mounted on"]
        for mount in sorted(self.rng.sample(_MOUNTS, self.rng.randint(3, 6))):
            size, percent = self.rng.choice([20, 50, 100, 250, 500, 900]), self.rng.randint(3, 98)
            used = size * percent // 100
            device = self.rng.choice(["/dev/sda1", "/dev/nvme0n1p2", "/dev/mapper/vg0-data", "tmpfs", "overlay"])
            rows.append(f"{device:<15} {size:>3}G {used:>4}G {size - used:>4}G {percent:>3}% {mount}")
        return [("tool", self._prompt("df -h") + "\n".join(rows), "shell")]

    def _unit_status(self) -> list[tuple[str, str, str | None]]:
        unit, since = self.rng.choice(_UNITS), self.clock - timedelta(minutes=self.rng.randint(2, 9000))
        state = self.rng.choice(["active (running)", "active (running)", "failed (Result: exit-code)", "activating"])
        text = (
            f"● {unit}.service\n     Loaded: loaded (/etc/systemd/system/{unit}.service; enabled)\n"
            f"     Active: {state} since {since:%a %H:%M:%S}\n   Main PID: {self.rng.randint(300, 32000)} ({unit})\n"
            f"      Tasks: {self.rng.randint(1, 90)}\n     Memory: {self.rng.uniform(2, 900):.1f}M\n"
            + self._fill("{clock} systemd[1]: {unit}: {service} {verb}")
        )
        return [("tool", self._prompt(f"systemctl status {unit}") + text, "shell")]

    def _pods(self) -> list[tuple[str, str, str | None]]:
        rows = ["NAME                              READY   STATUS             RESTARTS   AGE"]
        for service in self.rng.sample(_SERVICES, self.rng.randint(3, 6)):
            pod = f"{service}-{self.rng.getrandbits(32):08x}-{self.rng.choice('bcdfghjk')}{self.rng.randint(2, 9)}zx"
            status = self.rng.choice(["Running", "Running", "Running", "CrashLoopBackOff", "Pending", "Terminating"])
            rows.append(
                f"{pod:<33} {self.rng.randint(0, 1)}/1     {status:<18} {self.rng.randint(0, 12):<10} "
                f"{self.rng.randint(1, 47)}h"
            )
        return [("tool", self._prompt("kubectl get pods -n prod") + "\n".join(rows), "kubectl")]

    def _processes(self) -> list[tuple[str, str, str | None]]:
        rows = ["USER       PID %CPU %MEM COMMAND"]
        for _ in range(self.rng.randint(3, 7)):
            command = self._fill(self.rng.choice(["java -jar {service}.jar", "python -m {service}", "{unit}", "sshd"]))
            rows.append(
                f"{self.rng.choice(['root', 'app', 'www-data', 'postgres']):<8} {self.rng.randint(1, 32000):>5} "
                f"{self.rng.uniform(0, 99):4.1f} {self.rng.uniform(0, 40):4.1f} {command}"
            )
        return [("tool", self._prompt("ps aux --sort=-%cpu | head") + "\n".join(rows), "shell")]

    def _http(self) -> list[tuple[str, str, str | None]]:
        status = self.rng.choice(["200 OK", "200 OK", "404 Not Found", "502 Bad Gateway", "429 Too Many Requests"])
        body = json.dumps(
            {
                "service": self.rng.choice(_SERVICES),
                "request": self._fill("{id}-{id}"),
                "status": status[:3],
                "items": [self._fill("{service}/{id}") for _ in range(self.rng.randint(1, 4))],
                "took_ms": self.rng.randint(2, 999),
            },
            indent=self.rng.choice([None, 2]),
        )
        head = f"HTTP/1.1 {status}\nDate: {self.clock:%a, %d %b %Y %H:%M:%S} GMT\nContent-Type: application/json\n\n"
        return [("tool", self._fill("GET https://{service}.internal{path}\n") + head + body, "http")]

    def _metrics(self) -> list[tuple[str, str, str | None]]:
        payload = {
            "at": self.clock.isoformat(),
            "host": self.rng.choice(_HOSTS),
            "cpu": round(self.rng.random(), 2),
            "load": [round(self.rng.uniform(0, 20), 2) for _ in range(3)],
            "net": {"rx_mb": self.rng.randint(1, 900), "tx_mb": self.rng.randint(1, 900)},
            "top": [self._fill("{service}") for _ in range(2)],
        }
        return [("observation", json.dumps(payload), "metrics")]

    def _python_trace(self) -> list[tuple[str, str, str | None]]:
        lines = [self._fill(f"{self.clock:%H:%M:%S} {{service}} worker {{small}}: unhandled error")]
        lines.append("Traceback (most recent call last):")
        for function in self.rng.sample(_FUNCTIONS, self.rng.randint(2, 4)):
            module = self.rng.choice(_SERVICES)
            lines.append(f'  File "/app/{module}/core.py", line {self.rng.randint(10, 900)}, in {function}')
            lines.append(
                f"    {self.rng.choice(['return', 'result =', 'await', 'yield'])} {self.rng.choice(_FUNCTIONS)}()"
            )
        error, detail = self.rng.choice(_ERRORS)
        lines.append(f"{error}: {self._fill(detail)}")
        return [("observation", "\n".join(lines), "logs")]

    def _java_trace(self) -> list[tuple[str, str, str | None]]:
        lines = [f"{self.clock:%H:%M:%S} ERROR {self.rng.choice(_JAVA)}: " + self._fill("{service} on {host} {verb}")]
        for name in self.rng.sample(_CLASSES, self.rng.randint(3, 5)):
            method = self.rng.choice(_FUNCTIONS)
            lines.append(
                f"\tat shop.{self.rng.choice(_SERVICES)}.{name}.{method}({name}.java:{self.rng.randint(20, 700)})"
            )
        lines.append(f"\t... {self.rng.randint(5, 60)} more")
        return [("observation", "\n".join(lines), "logs")]

    def _commits(self) -> list[tuple[str, str, str | None]]:
        verbs = ["fix", "bump", "drop", "rename", "log", "cache", "retry"]
        lines = [
            self._fill(f"{self.rng.getrandbits(28):07x} {{person}}: {self.rng.choice(verbs)} {{service}} {{path}}")
            for _ in range(self.rng.randint(3, 6))
        ]
        return [("tool", self._prompt("git log --oneline --since=yesterday") + "\n".join(lines), "shell")]

    def _query(self) -> list[tuple[str, str, str | None]]:
        rows = [
            f" {self._fill('{service}'):<16} | {self.rng.randint(0, 999):>6} | {self.rng.uniform(0, 90):>7.2f}"
            for _ in range(self.rng.randint(3, 6))
        ]
        head = " queue            | waiting | seconds\n------------------+--------+--------\n"
        return [("tool", self._prompt("psql -c 'select * from queue_depth'") + head + "\n".join(rows), "psql")]
