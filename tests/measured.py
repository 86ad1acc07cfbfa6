"""One call in a process of its own: what it said, how much time and memory it took."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """
import contextlib, json, re, resource, sys, time
from pathlib import Path
import dora_export.api
from dora_export.errors import DoraExportError
{imports}

def memory(field):
    return int(re.search(field + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

resource.setrlimit(resource.RLIMIT_AS, ({space}, {space}))
with contextlib.suppress(OSError):  # where it is denied, the imports' own peak counts as well
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
before, started = memory("VmRSS"), time.process_time()  # whatever else the machine does
try:
    {call}
    said = ""
except DoraExportError as error:
    said = str(error)
print(json.dumps([said, time.process_time() - started, memory("VmHWM") - before]))
"""


@dataclass(frozen=True)
class Measured:
    """What a call did: its refusal (or nothing), CPU seconds, and bytes beyond the imports."""

    said: str
    seconds: float
    peak: int


def measured(call, *, imports="", space=4 << 30, seconds=60):
    """Run a statement; fails if it ends in anything but success or a refusal."""
    script = SCRIPT.format(call=call, imports=imports, space=space)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds,
        check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return Measured(*json.loads(result.stdout.splitlines()[-1]))
