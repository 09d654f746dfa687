"""docs/tutorial.md: its Python boxes are run as one session, and print what the page says they print."""

import subprocess
import sys

from tests.patience import PATIENCE_S
from tests.pure.tutorial import PAGE, ROOT, session

END = "--- end of box"


def test_the_session_prints_what_the_page_says() -> None:
    found = session(PAGE.read_text(encoding="utf-8"))
    script = "".join(f"{box.typed}\nprint({END!r})\n" for box in found)
    ran = subprocess.run(
        [sys.executable, "-X", "utf8", "-"],
        cwd=ROOT, input=script, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE_S,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    printed = [part.splitlines() for part in ran.stdout.split(f"{END}\n")]
    assert printed == [*(box.printed for box in found), []]
