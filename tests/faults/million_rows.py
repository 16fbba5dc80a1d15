"""Reading, checking and splitting a table of a million rows under a cap on memory.

python -m tests.faults.million_rows --rows 1000000 --cap-mib 1536

The cap is the kernel's (RLIMIT_DATA): what is above it is a MemoryError. Rows have the mission's size, about 740 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.results import write_result

ROOT = Path(__file__).parents[2]
WRITE = """
import sys
from pathlib import Path
from tests.examples.files import write_many
write_many(Path(sys.argv[1]), int(sys.argv[2]))
"""
READ = """
import json, resource, sys, time
from pathlib import Path
from mathverify.config import DataConfig, DataSource
from mathverify.examples.sources import load

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

start = peak = status("RssAnon")
cap = status("VmData") + (int(sys.argv[3]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

def watch(what, done, total):
    global peak
    peak = max(peak, status("RssAnon"))

begun = time.monotonic()
loaded = load(DataConfig(source=DataSource.table, train=sys.argv[1], cache_dir=sys.argv[2]), watch)
peak = max(peak, status("RssAnon"))
rows = sum(survey.rows for survey in loaded.surveys.values())
print(json.dumps({"rows": rows, "mib_above_start": (peak - start) >> 20, "seconds": round(time.monotonic() - begun, 1)}))
"""


def measure(rows: int, cap_mib: int, ending: str = "parquet") -> dict[str, Any]:
    """Make the file, then read it in a process that may use no more than `cap_mib` MiB for itself.

    Returns:
        rows, mib_above_start (most memory held, at the moments that progress is told), seconds, bytes of the file.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / f"rows.{ending}"
        subprocess.run([sys.executable, "-c", WRITE, str(file), str(rows)], env=environment, check=True)
        command = [sys.executable, "-c", READ, str(file), f"{work}/cache", str(cap_mib)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found | {"cap_mib": cap_mib, "file_mib": file.stat().st_size >> 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cap-mib", type=int, default=1536)
    options = parser.parse_args()
    found = measure(options.rows, options.cap_mib)
    write_result("million_rows", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
