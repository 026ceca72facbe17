"""What memory is free, and bytes in a unit that people read."""

from __future__ import annotations

from pathlib import Path


def available() -> int | None:
    """Bytes this process can still take: what the kernel says, or the container's limit; None if unknown."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(int(line.split()[1]) << 10)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        anonymous = next(line for line in used.read_text().splitlines() if line.startswith("anon "))
        free.append(int(limit.read_text()) - int(anonymous.split()[1]))
    return min(free, default=None)


def gib(count: float) -> str:
    """Bytes in a unit that people read."""
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.0f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.1f} GiB"
