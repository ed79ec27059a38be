"""A limit on memory that the operating system keeps: a control group where one may be made, else a limit on addresses.

Linux counts for a control group all that its processes use: their own memory, and the pages of files that it keeps for them. Group and
limit are gone with the `with` block. Making one takes rights that root has, and some users.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Where a process's group is by /proc/self/cgroup, and the files with its limit and its peak: version 1, then version 2.
KINDS = {"memory": ("memory/", "memory.limit_in_bytes", "memory.max_usage_in_bytes"), "": ("", "memory.max", "memory.peak")}
JOIN = 'echo $$ > "$0" && exec "$@"'


class Group(NamedTuple):
    """A control group with a limit, and the file that says how much was used at most."""

    folder: Path
    peak_file: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """A command line that joins the group and then becomes `command`."""
        return ["sh", "-c", JOIN, str(self.folder / "cgroup.procs"), *command]

    @property
    def peak(self) -> int:
        """Bytes. What the system kept of files counts, so a reader of large files comes near the limit whatever it needs."""
        return int(self.peak_file.read_text())


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Group | None]:
    """A group below this process's own whose members get at most `limit` bytes together; None where the system lets us make none."""
    group = None
    for controller, (place, limit_file, peak_file) in KINDS.items():
        own = _own_group(controller)
        if own is None or group is not None:
            continue
        folder = CGROUPS / f"{place}{own.strip('/')}" / f"flux_lab-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                # The file is there if the group may limit memory; a plain write would fail otherwise, and does.
                with (folder / limit_file).open("r+") as file:
                    file.write(str(limit))
                group = Group(folder, folder / peak_file)
            except OSError:
                folder.rmdir()
    try:
        yield group
    finally:
        if group is not None:
            _remove(group.folder)


def _own_group(controller: str) -> str | None:
    """The group of this process in the tree of a controller; "" is the one tree of version 2."""
    if not OWN_GROUPS.exists():
        return None
    lines = (line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines())
    return next((path for _, controllers, path in lines if controller in controllers.split(",")), None)


def _remove(folder: Path) -> None:
    """A process that has just ended may be counted for a moment."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)


def limit_addresses(limit: int) -> None:
    """RLIMIT_AS for this process: all its addresses, so all that is in memory, mapped pages too."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
