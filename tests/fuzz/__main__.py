"""`make fuzz`: many random programs, in several processes of different seeds.

    ATTNPASS_FUZZ_EXAMPLES   how many (20,000)          ATTNPASS_FUZZ_SEED      the first seed (drawn, and printed)
    ATTNPASS_FUZZ_WORKERS    processes (2)              ATTNPASS_FUZZ_DEVICE    cpu or cuda
    ATTNPASS_FUZZ_FOLDER     where failing programs are saved (build/fuzz)
    ATTNPASS_FUZZ_INDUCTOR   every so many compiled programs go through inductor (25; 0: none)

Exit status 1 when a result is wrong, or fewer than 99 % of the programs that must be replaced are.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARE = 0.99


def main() -> int:
    count = int(os.environ.get("ATTNPASS_FUZZ_EXAMPLES", "20000"))
    seed = int(os.environ.get("ATTNPASS_FUZZ_SEED", random.randrange(10**6)))
    workers = int(os.environ.get("ATTNPASS_FUZZ_WORKERS", "2"))
    print(f"{count} programs, seed {seed}, {workers} workers", flush=True)
    from tests.fuzz.campaign import Tally

    total = Tally()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{n}.pickle" for n in range(workers)]
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.fuzz",
                    str(count // workers + (n < count % workers)),
                    str(seed + n),
                    str(path),
                ]
            )
            for n, path in enumerate(results)
        ]
        failed = [process.wait() for process in running]
        for path in results:
            if path.exists():
                total.add(pickle.loads(path.read_bytes()))
    print(total.words())
    print(f"seed {seed}")
    return int(any(failed) or bool(total.wrong) or total.share < SHARE)


def worker(count: int, seed: int, result: Path) -> int:
    import torch

    from tests.fuzz.campaign import Tally, run

    torch.set_num_threads(1)
    told = time.monotonic()

    def say(tally: Tally) -> None:
        nonlocal told
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(
                f"seed {seed}: {tally.drawn} of {count}, {tally.drawn / tally.seconds:.1f} a second, "
                f"{tally.share:.2%} replaced, {len(tally.wrong)} wrong",
                flush=True,
            )

    every = int(os.environ.get("ATTNPASS_FUZZ_INDUCTOR", "25"))
    tally = run(
        count,
        seed,
        device=os.environ.get("ATTNPASS_FUZZ_DEVICE", "cpu"),
        inductor_every=every or None,
        folder=Path(os.environ.get("ATTNPASS_FUZZ_FOLDER", "build/fuzz")),
        say=say,
    )
    result.write_bytes(pickle.dumps(tally))
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(main())
