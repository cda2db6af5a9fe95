"""What stands in for the frontend in front of a role: it keeps what the engine says of each request."""

from dataclasses import dataclass, field

from common.messages import CacheFlushed, EngineToFrontend, Failed, Finished, RowBlock, Tokens


@dataclass
class Leg:
    """What one worker has said of one request; `num_ends` answers are due."""

    num_ends: int = 1
    tokens: list[int] = field(default_factory=list)
    """Of the first sample."""
    ends: dict[int, Finished] = field(default_factory=dict)
    blocks: dict[int, RowBlock] = field(default_factory=dict)
    failed: Failed | None = None

    @property
    def finished(self) -> Finished | None:
        return self.ends.get(0)

    @property
    def ended(self) -> bool:
        return len(self.ends) == self.num_ends or self.failed is not None


class Recorder:
    """Takes the place of the frontend."""

    def __init__(self) -> None:
        self.legs: dict[str, Leg] = {}
        self.flushed: list[CacheFlushed] = []

    def __call__(self, message: EngineToFrontend, /, *frames: bytes | memoryview) -> None:
        if isinstance(message, CacheFlushed):
            self.flushed.append(message)
            return
        assert isinstance(message, Tokens | Finished | Failed)
        leg = self.legs[message.rid]
        assert not leg.ended, "a leg was answered twice"
        match message:
            case Tokens():
                leg.tokens += message.token_ids if message.index == 0 else []
            case Finished():
                assert message.index not in leg.ends
                leg.ends[message.index] = message
                if message.rows is not None:
                    leg.blocks[message.index] = RowBlock(message.rows, bytes(frames[0]))
            case Failed():
                leg.failed = message
