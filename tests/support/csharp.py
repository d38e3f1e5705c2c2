"""The C# program that uses the wrapper, and what it must print."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT / "runtime" / "native" / "dotnet"
TRIAL = ROOT / "benchmarks" / "trials" / "windows" / "Trial.cs"

_CLOSED = r"ObjectDisposedException: .*"
_BUSY = r"ModelException: another call is in progress: wait for it or cancel it\."

MISUSED = (
    r"null package: ArgumentNullException: .*",
    r"no package: ModelException: .*no such folder is not a package: it does not exist or .*",
    r"unknown provider: ModelException: there is no provider 'cuda': choose auto, cpu or .*",
    r"verified: True",
    r"report throws: IOException: mine",
    r"round trip: True",
    r"ids: 5",
    r"half a surrogate: ArgumentException: the text has half of a surrogate pair at 1\..*",
    r"NUL in a prompt: ArgumentException: the text has a NUL\..*",
    r"null message: ArgumentException: a message is null\..*",
    r"unknown adapter: ModelException: .* has no adapter 'none'\.",
    r"negative length: ArgumentOutOfRangeException: .*",
    r"callback throws: InvalidDataException: mine",
    r"pieces before it: 3, Stopped",
    r"the same after it: True",
    r"left after 2: 2, Stopped",
    r"cancelled: OperationCanceledException: .*",
    rf"busy: {_BUSY}",
    rf"busy in another thread: {_BUSY}",
    r"stop text: True, Stop",
    r"null stop: ArgumentException: a text is null\..*",
    r"rewound too far: ModelException: the session has \d+ tokens: it cannot be .*",
    r"negative rewind: ArgumentOutOfRangeException: .*",
    r"loaded: True",
    r"nothing to load: ModelException: .*none cannot be read\.",
    r"messages after text: ModelException: the session has text or tokens that are not .*",
    r"two at once: True",
    r"seeded: True",
    r"disposed by its own callback: nothing",
    r"pieces until then: 1",
    rf"disposed model: {_CLOSED}",
    rf"disposed model's session: {_CLOSED}",
    r"session after its model: nothing",
    rf"disposed session: {_CLOSED}",
    rf"disposed stream: {_CLOSED}",
    r"end",
)
"""A pattern for each line that Trial.cs prints in its mode `misuse`."""
