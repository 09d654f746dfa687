"""A request's life, as tests of traces have it."""

from baton.timeline import Life, Moment, Timeline
from baton.wire.records import Ended, Timings

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
"""What the client sends as traceparent."""
END = 102.375
ENDED = Ended("cmpl-1-0", "stop", 9, 7, "shm", Timings())


def life() -> Life:
    """Half a second in the queue, 1.5 s filled and handed over, decoded until END."""
    timeline = Timeline()
    timeline.add(
        [
            Moment("cmpl-1-0", 100.0, "queued", tokens=9),
            Moment("cmpl-1-0", 100.5, "filling", "prefill-0.ab"),
            Moment("cmpl-1-0", 102.0, "decoding", "decode-0.cd", handover_s=0.25),
            Moment("cmpl-1-0", END, "finished", tokens=7, note="stop"),
        ]
    )
    found = timeline.get("cmpl-1-0")
    assert found is not None
    return found
