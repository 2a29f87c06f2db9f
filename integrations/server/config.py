"""What a server allows those who call it."""

from __future__ import annotations

from pydantic import ByteSize, Field

from infllm_agent.config import Settings


class ServerConfig(Settings):
    """Limits of a server; each is for one key where there are keys, unless stated otherwise."""

    served_name: str | None = Field(None, description="what the model is called by those who ask for it")
    most_tokens: int = Field(16_384, ge=1, description="most tokens that a request may ask for")
    body_bytes: ByteSize = Field(
        ByteSize(32 << 20),
        ge=1,
        description="largest body of a request, such as 32MB; what is streamed in is unbounded",
    )
    import_bytes: ByteSize = Field(
        ByteSize(64 << 30), ge=1, description="largest archive that is made a session of, such as 10GB"
    )
    requests_per_minute: int | None = Field(None, ge=1, description="requests of one key in a minute; None: any number")
    concurrent: int = Field(64, ge=1, description="calls that are worked on, or wait for their session, of all keys")
    timeout_s: float = Field(600.0, gt=0, description="seconds after which a call fails")
    stall_s: float = Field(
        60.0,
        gt=0,
        description="seconds after which a client that does not read, or sends nothing of an archive, is left",
    )
    grace_s: float = Field(30.0, ge=0, description="seconds that calls under way have to end when the server stops")
    branches: int = Field(16, ge=1, description="branches of a session that are kept; the least recently used go")
    nameless: int = Field(
        256, ge=1, description="histories that are kept of calls which name no session; the least recently used go"
    )
    shared: bool = Field(
        False, description="other servers have the same folder of sessions: what they ask for is given to them"
    )
