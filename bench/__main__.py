"""Run the scripts of this folder, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = (
    "import_time", "layer_speed", "peer", "backends", "training", "many_attributes", "classes",
    "streaming", "limits",
)  # fmt: skip


def main() -> int:
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or list(SCRIPTS)
    options = [a for a in sys.argv[1:] if a.startswith("-")]
    unknown = sorted(set(names) - set(SCRIPTS))
    if unknown:
        print(f"no such script: {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
        return 2
    failed = []
    for name in names:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *options]).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
